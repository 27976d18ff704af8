"""Dictionaries of features: encoders and decoders, and their files."""
