"""What touches a live model, and the types that every room shares."""
