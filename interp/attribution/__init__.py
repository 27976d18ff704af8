"""Direct attribution: how much each part of a text and of a model adds to an observable."""
