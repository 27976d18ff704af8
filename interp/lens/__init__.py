"""Lenses: what streams say when they are read as the last one is."""
