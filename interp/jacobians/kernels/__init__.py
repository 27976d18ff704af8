"""Fused kernels for closed forms on a GPU, each with a form in torch of the same signature, chosen by device."""
