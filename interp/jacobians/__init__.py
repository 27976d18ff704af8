"""Batched Jacobians between sites: closed forms where a block is recognised, autograd in chunks elsewhere."""
