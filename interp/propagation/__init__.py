"""Observable propagation: feature vectors at any site, along a path or over all paths."""
