"""Activation stores: what a model computed on a data set, on disk."""
