"""Normalisations of second moments."""

import torch
from jaxtyping import Float
from torch import Tensor


def column_l2(maps: Float[Tensor, "*batch q p"], eps: float = 1e-6) -> Float[Tensor, "*batch q p"]:
    """Each column (a fixed channel of the second head) divided by max(its l2 norm, eps). A zero column stays zero.

    The gradient at a zero column is 1/eps: with eps = 1e-6 it stays finite in float32.

    Example:
        >>> column_l2(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).tolist()
        [[0.6..., 0.0], [0.8..., 0.0]]
    """
    floor = torch.as_tensor(eps**2, dtype=maps.dtype, device=maps.device)
    return maps / (maps**2).sum(-2, keepdim=True).clamp(min=floor).sqrt()


def signed_sqrt(vectors: Float[Tensor, "batch k"], eps: float = 1e-6) -> Float[Tensor, "batch k"]:
    """sign(c) sqrt(|c| + eps), then unit l2 norm of each vector. Zeros stay zero.

    Example:
        >>> signed_sqrt(torch.tensor([[9.0, -16.0]])).tolist()
        [[0.6..., -0.8...]]
    """
    roots = vectors.sign() * (vectors.abs() + eps).sqrt()
    return roots / (roots**2).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()


def newton_schulz(matrices: Float[Tensor, "*batch q q"], steps: int = 5) -> Float[Tensor, "*batch q q"]:
    """Approximate square root of symmetric positive semidefinite S by the coupled Newton-Schulz iteration.

    Y = S / tr S, Z = I; then T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z, ``steps`` times; the root is sqrt(tr S) Y. Five
    steps, as is customary, give a partial root: small eigenvalues come last (error about 0.2 for 64 x 64 matrices).

    Example:
        >>> newton_schulz(torch.diag(torch.tensor([4.0, 9.0])), steps=20).round(decimals=3).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-30)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    y, z = matrices / trace, identity.expand_as(matrices)
    for _ in range(steps):
        t = (3 * identity - z @ y) / 2
        y, z = y @ t, t @ z
    return trace.sqrt() * y


def eig_power(matrices: Float[Tensor, "*batch q q"], power: float = 0.5) -> Float[Tensor, "*batch q q"]:
    """V diag(max(l, 0)^power) V^T of symmetric matrices, exactly. Not for training: eigh's backward is unstable."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=0).pow(power)[..., None, :]) @ vectors.transpose(-1, -2)


def log_euclid(matrices: Float[Tensor, "*batch q q"], eps: float = 1e-3) -> Float[Tensor, "*batch q q"]:
    """V diag(log(l + eps tr/q)) V^T. The rank is at most tokens - 1, so eps matters; a zero matrix gives zero."""
    values, vectors = torch.linalg.eigh(matrices)
    floor = eps * values.sum(-1, keepdim=True) / matrices.shape[-1]
    logs = torch.where(floor > 0, (values.clamp(min=0) + floor).clamp(min=1e-300).log(), 0.0)
    return (vectors * logs[..., None, :]) @ vectors.transpose(-1, -2)
