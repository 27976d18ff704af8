"""Probes: estimators on activations."""
