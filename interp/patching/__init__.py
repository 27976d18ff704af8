"""Activation patching in all its forms: exact grids, first-order grids, edges, and single paths."""
