"""The explorer: pages in a browser on a live model or a saved run. It computes nothing that the library does not."""
