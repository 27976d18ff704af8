"""Row-wise kernels: tangents through norms, softmax and gates. Limited by memory; each is one pass over the tangents.

What a token's statistics are is read once for all of its k tangents. On a CPU, for float64 and without Triton the same
formulas run in torch.
"""

from jaxtyping import Float
from torch import Tensor

from interp.jacobians.kernels.device import Way, runs_fused


def rms_jvp(
    v: Float[Tensor, "k ... d"], normalized: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"],
    gain: Float[Tensor, "d"] | None = None, held: bool = False, transposed: bool = False, way: Way = "auto",
) -> Float[Tensor, "k ... d"]:  # fmt: skip
    """Return tangents through RMSNorm, γ ⊙ (v - n (n·v)/d)/r; the transpose starts with the gain.

    Args:
        v: k tangents of each token (of the transpose: covectors).
        normalized: n = x/r.
        scale: r.
        gain: γ.
        held: Whether r is held, which leaves γ ⊙ v/r.
        transposed: Whether covectors are pulled instead.
        way: ``fused``, ``torch`` or ``auto``, by device.

    Raises:
        ArgumentError: If a kernel was asked for where none runs.
        MissingExtraError: If a kernel was asked for without Triton.

    Example:
        >>> import torch
        >>> from interp.jacobians.kernels.rows import rms_jvp
        >>> x = torch.tensor([3.0, 4.0])
        >>> r = x.square().mean(-1, keepdim=True).sqrt()
        >>> rms_jvp(x[None], x / r, r).abs().max() < 1e-6    # the norm ignores the scale of x
        tensor(True)
    """
    return _norm_jvp(v, normalized, scale, gain, False, held, transposed, way)


def ln_jvp(
    v: Float[Tensor, "k ... d"], normalized: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"],
    gain: Float[Tensor, "d"] | None = None, held: bool = False, transposed: bool = False, way: Way = "auto",
) -> Float[Tensor, "k ... d"]:  # fmt: skip
    """Return tangents through LayerNorm, γ ⊙ (v - mean v - n (n·v)/d)/r with n = (x - mean x)/r.

    Arguments and errors are those of `rms_jvp`.

    Example:
        >>> import torch
        >>> from interp.jacobians.kernels.rows import ln_jvp
        >>> n, r = torch.tensor([1.0, -1.0, 0.0]), torch.ones(1)
        >>> ln_jvp(torch.ones(1, 3), n, r)                   # nor does this norm see the mean
        tensor([[0., 0., 0.]])
    """
    return _norm_jvp(v, normalized, scale, gain, True, held, transposed, way)


def _norm_jvp(v, normalized, scale, gain, centred: bool, held: bool, transposed: bool, way: Way) -> Tensor:
    if runs_fused(way, v):
        from interp.jacobians.kernels import triton_rows

        return triton_rows.norm_jvp(v, normalized, scale, gain, centred, held, transposed)
    if transposed and gain is not None:
        v = v * gain.to(v)
    v = v - v.mean(-1, keepdim=True) if centred else v
    if not held:
        v = v - normalized * ((normalized * v).sum(-1, keepdim=True) / normalized.shape[-1])
    v = v / scale
    return v if transposed or gain is None else v * gain.to(v)


def softmax_jvp(
    pattern: Float[Tensor, "... key"], v: Float[Tensor, "k ... key"], way: Way = "auto"
) -> Float[Tensor, "k ... key"]:
    """Return tangents through a softmax with value A, A (v - Σ A v), its own transpose.

    Where A is 0 (masked keys, which may hold NaN) the tangent counts as 0. Arguments and errors as in `rms_jvp`.

    Example:
        >>> import torch
        >>> from interp.jacobians.kernels.rows import softmax_jvp
        >>> softmax_jvp(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([[1.0, 0.0, torch.nan]]))
        tensor([[ 0.2500, -0.2500,  0.0000]])
    """
    if runs_fused(way, v):
        from interp.jacobians.kernels import triton_rows

        return triton_rows.softmax_jvp(pattern, v)
    weighted = (pattern * v).masked_fill_(pattern == 0, 0.0)
    return weighted.addcmul_(pattern, weighted.sum(-1, keepdim=True), value=-1.0)


def gate_tangent(
    p: Float[Tensor, "... f"], dg: Float[Tensor, "k ... f"], q: Float[Tensor, "... f"] | None = None,
    du: Float[Tensor, "k ... f"] | None = None, way: Way = "auto",
) -> Float[Tensor, "k ... f"]:  # fmt: skip
    """Return p ⊙ dg + q ⊙ du, the tangent of act(g) ⊙ u; without a gate p ⊙ dg. Errors as in `rms_jvp`.

    Example:
        >>> import torch
        >>> from interp.jacobians.kernels.rows import gate_tangent
        >>> gate_tangent(torch.tensor([2.0]), torch.ones(1, 1), torch.tensor([3.0]), torch.ones(1, 1))
        tensor([[5.]])
    """
    if runs_fused(way, dg):
        from interp.jacobians.kernels import triton_rows

        return triton_rows.gate_tangent(p, dg, q, du)
    made = dg * p
    return made if q is None or du is None else made.addcmul_(du, q)
