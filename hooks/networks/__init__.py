"""Networks that interp carries itself, since the packages that hold their weights have no usable code."""
