"""Calls that a network makes, sorted by what they do to a live value. A live value depends on the input.

Names are those of torch functions with underscores stripped, so that `F.relu`, `torch.relu_`, `Tensor.relu` and an
operator's dunder are one name. What stands in none of these sets is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

METADATA = frozenset(
    """
    shape size dim ndim ndimension numel nelement dtype device layout requires_grad is_floating_point is_complex
    is_contiguous stride storage_offset get_device is_leaf grad_fn len element_size names is_cuda is_meta is_cpu
    is_quantized is_sparse is_mkldnn is_nested is_mps is_xla itemsize nbytes version data_ptr untyped_storage
    has_names is_signed is_inference is_conj is_neg result_type can_cast promote_types requires_grad_ retain_grad
    hash repr str format is_same_size zeros_like ones_like empty_like full_like rand_like randn_like new_zeros
    new_ones new_empty new_full new_tensor is_shared
    """.split()
)

RESHAPES = frozenset(
    """
    view reshape view_as reshape_as flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t T mT H
    mH adjoint squeeze unsqueeze expand expand_as contiguous clone to float double half bfloat16 type type_as cpu
    cuda chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind narrow select slice getitem ravel
    atleast_1d atleast_2d atleast_3d alias
    """.split()
)

# Calls that take only the shape or type of their second tensor.
SHAPED_LIKE = frozenset("expand_as view_as reshape_as type_as resize_as to".split())

LINEAR = RESHAPES | frozenset(
    """
    add radd iadd sub rsub isub subtract neg negative positive cat concat concatenate stack hstack vstack dstack
    column_stack sum nansum mean cumsum diff trapezoid repeat tile repeat_interleave index_select gather take
    take_along_dim roll flip fliplr flipud rot90 pad constant_pad_nd avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample upsample_nearest
    upsample_bilinear pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle fold unfold tril triu
    diag diagonal diag_embed trace masked_fill where setitem copy zero fill index_add index_copy index_put scatter
    scatter_add select_scatter slice_scatter as_strided meshgrid broadcast_tensors broadcast_to real imag
    view_as_real view_as_complex fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2
    fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift fft_hfft fft_ihfft conj affine_grid
    max_unpool1d max_unpool2d max_unpool3d nan_to_num identity resolve_conj resolve_neg block_diag
    """.split()
)

DROPOUTS = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout".split()
)

BILINEAR = frozenset(
    """
    matmul rmatmul imatmul bmm mm mv dot inner outer ger einsum tensordot baddbmm addmm addbmm addmv addr
    chain_matmul multi_dot vdot kron bilinear
    """.split()
)

WEIGHTED = frozenset(
    """
    linear grouped_mm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution
    embedding embedding_bag stft istft
    """.split()
)

PRODUCTS = frozenset("mul rmul imul multiply".split())

QUOTIENTS = frozenset("div rdiv idiv truediv rtruediv itruediv divide true_divide".split())

POWERS = frozenset("pow ipow rpow square float_power".split())

ROOTS = frozenset("sqrt rsqrt reciprocal".split())

# Of a value and its own mean, the centring of a norm written by hand.
DIFFERENCES = frozenset("sub isub subtract".split())

DIVISORS = frozenset(
    """
    norm linalg_vector_norm vector_norm linalg_norm std var
    """.split()
)

COMPARISONS = frozenset(
    """
    gt lt ge le eq ne greater less greater_equal less_equal not_equal sign signbit sgn floor ceil round trunc isnan
    isinf isposinf isneginf isfinite argmax argmin argsort heaviside logical_and logical_or logical_not logical_xor
    bitwise_and bitwise_or bitwise_not bitwise_xor and or xor invert bucketize searchsorted histc one_hot isin long int
    short byte bool char
    """.split()
)

SELECTIONS = frozenset(
    """
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices fractional_max_pool2d
    fractional_max_pool2d_with_indices amax amin max min topk sort msort kthvalue median nanmedian mode maximum
    minimum fmax fmin cummax cummin aminmax remainder fmod frac
    """.split()
)

CONTROL_FLOW = frozenset(
    """
    __bool__ __int__ __float__ __index__ __complex__ item tolist numpy __array__ nonzero __contains__ equal allclose
    is_nonzero unique bincount
    """.split()
)

DETACHING = frozenset(
    """
    detach data
    """.split()
)

_DUNDER_CASTS = {"__float__", "__int__", "__bool__", "__index__", "__complex__"}


def raw_name(func: Callable) -> str:
    """Return the function's own name; for a tensor's property, the property's; for a custom function, its class's."""
    name = getattr(func, "__name__", "")
    owner = func if isinstance(func, type) else getattr(func, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"{owner.__name__}.apply"
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def name_of(func: Callable) -> str:
    """Return the call's name with underscores stripped (in-place and dunder forms included).

    Example:
        >>> name_of(torch.Tensor.__iadd__), name_of(torch.relu_)
        ('iadd', 'relu')
    """
    name = raw_name(func)
    return name if name in _DUNDER_CASTS else name.strip("_")


def in_place(func: Callable, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes to its first argument."""
    name = raw_name(func)
    if name.startswith("__"):
        writes = name.startswith("__i") and name not in ("__index__", "__invert__", "__int__")
        return writes or name == "__setitem__"
    return name.endswith("_") or bool(kwargs.get("inplace"))


def tensors(*values: Any) -> list[Tensor]:
    """Return all tensors in nested arguments."""
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def is_live(value: Any) -> bool:
    """Whether a value depends on the input: autograd follows it, or a replay without gradients has marked it.

    Parameters are kept out: they require no gradient while a tape is made.
    """
    return isinstance(value, Tensor) and (value.requires_grad or getattr(value, "_interp_live", False))


def freeze_parameters(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return arguments with parameters that the model does not list (closures hold such) detached: constants."""
    own = lambda v: v.detach() if _is_foreign(v) else v
    if not any(_is_foreign(t) for t in tensors(args, kwargs)):
        return args, kwargs
    return tree_map(own, args), tree_map(own, kwargs)


def _is_foreign(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_leaf and not hasattr(value, "_interp_live")


def mark_live(value: Any) -> Any:
    """Mark the floating-point tensors in a value as dependent on the input, and return it."""
    for t in tensors(value):
        if t.is_floating_point() or t.is_complex():
            t._interp_live = True  # type: ignore[attr-defined]
    return value


# Where a linear call takes a constant number that is added: position and keyword.
_ADDED = {
    "add": (1, "other"), "radd": (1, "other"), "iadd": (1, "other"), "sub": (1, "other"), "rsub": (1, "other"),
    "isub": (1, "other"), "subtract": (1, "other"), "masked_fill": (2, "value"), "pad": (3, "value"),
    "constant_pad_nd": (2, "value"), "where": (2, "other"), "setitem": (2, "value"), "fill": (1, "value"),
}  # fmt: skip


def without_constants(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return a linear call's linear part: every constant that it would add or copy in is zero."""
    zero = lambda v: v.new_zeros(()).expand(v.shape) if _is_constant(v) else v
    name = name_of(func)
    if in_place(func, kwargs) and args and _is_constant(args[0]):
        args[0].zero_()  # the network writes a live value into a buffer of its own
        args, kwargs = (args[0], *tree_map(zero, args[1:])), tree_map(zero, kwargs)
    else:
        args, kwargs = tree_map(zero, args), tree_map(zero, kwargs)
    slots = [_ADDED[name]] if name in _ADDED else []
    slots += [(1, "input")] if name == "where" else []
    for slot, keyword in slots:
        if len(args) > slot and isinstance(args[slot], (int, float)):
            args = (*args[:slot], 0.0, *args[slot + 1 :])
        if isinstance(kwargs.get(keyword), (int, float)):
            kwargs = kwargs | {keyword: 0.0}
    return func(*args, **kwargs)


def _is_constant(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not is_live(value)


def expand(func: Callable, args: tuple, kwargs: dict, reference: list[Tensor], homogeneous: bool = False) -> Any:
    """Return func's affine expansion at a reference, f(z) + J_f(z)(v - z), or its linear part J_f(z) v.

    ``reference`` lists the live arguments' values z in the order in which they are met; batch axes of size one
    broadcast. Outputs without a derivative (indices) are those at the reference.
    """
    leaves, spec = tree_flatten((args, kwargs))
    slots = [i for i, leaf in enumerate(leaves) if is_live(leaf)]
    live = [leaves[i] for i in slots]
    points = [z.expand_as(v).contiguous() for z, v in zip(reference, live, strict=True)]
    shapes: list[Any] = []

    def call(*values):
        filled = list(leaves)
        for slot, value in zip(slots, values, strict=True):
            filled[slot] = value
        flat, out_spec = tree_flatten(_fresh(func, *tree_unflatten(filled, spec)))
        shapes.append(out_spec)
        smooth = [out for out in flat if out.is_floating_point() or out.is_complex()]
        return smooth, [out for out in flat if not (out.is_floating_point() or out.is_complex())]

    # A masked score is -inf at the reference and in the probe: it does not move.
    moves = [v if homogeneous else v - z for v, z in zip(live, points, strict=True)]
    deltas = tuple(torch.where(torch.isfinite(z), move, 0.0) for move, z in zip(moves, points, strict=True))
    values, slopes, fixed = torch.func.jvp(call, tuple(points), deltas, has_aux=True)  # type: ignore[misc]
    moved = slopes if homogeneous else [value + slope for value, slope in zip(values, slopes, strict=True)]
    # Values come first in every call that also gives indices (topk, sort, max, pooling).
    return tree_unflatten([*moved, *fixed], shapes[-1])


def _fresh(func: Callable, args: tuple, kwargs: dict) -> Any:
    """The call on a copy of its first argument where it would write to it."""
    if in_place(func, kwargs):
        args = (args[0].clone(), *args[1:])
    return func(*args, **kwargs)
