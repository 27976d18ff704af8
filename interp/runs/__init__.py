"""Runs: specs of analyses, what executes them, and the folders that hold their results."""
