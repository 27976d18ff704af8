"""The moment head MHC^3: a linear branch on the first moment, and one on cross-covariances of learned projections.

Source: Gao, Wang, Lin, Zhu, Hu, Zhou, "Tuning Pre-trained Model via Moment Probing", ICCV 2023 (arXiv 2307.11342),
section 3; where the authors' code differs from the paper, both are here and the docstrings say which is which.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.hooks.errors import ArgumentError
from interp.probes.covariance_norms import column_l2, newton_schulz, signed_sqrt
from interp.probes.moments import Centre

Pairing = Literal["near", "all", "halves", "first", "self"]
MapNorm = Literal["column_l2", "signed_sqrt", "isqrt", "none"]
Combine = Literal["mean", "sum", "learned"]
First = Literal["mean", "last", "cls"]


def pairs(heads: int, pairing: Pairing) -> list[tuple[int, int]]:
    """Which heads are correlated: neighbours, all pairs, k with k + H/2, the first with every other, each with itself.

    Raises:
        ArgumentError: If the pairing is not known, or there are no such pairs.

    Example:
        >>> pairs(4, "near"), pairs(4, "halves")
        ([(0, 1), (1, 2), (2, 3)], [(0, 2), (1, 3)])
    """
    if pairing == "near":
        found = [(k, k + 1) for k in range(heads - 1)]
    elif pairing == "all":
        found = [(j, k) for j in range(heads) for k in range(j + 1, heads)]
    elif pairing == "halves" and heads % 2 == 0:
        found = [(k, k + heads // 2) for k in range(heads // 2)]
    elif pairing == "first":
        found = [(0, k) for k in range(1, heads)]
    elif pairing == "self":
        found = [(k, k) for k in range(heads)]
    else:
        found = []
    if not found:
        raise ArgumentError(f"pairing={pairing!r} of {heads} heads", "near, all, first or self of at least 2 heads "
                            "(self: 1), or halves of an even number")  # fmt: skip
    return found


class MomentHead(nn.Module):
    """Logits of token sets from their first and second moments.

    With tokens X [T, d] of one example and n of them valid:

        U = X A + a, cut into H contiguous heads of q channels;  Z_k = LayerNorm(U_k), one LayerNorm for all heads
        centred;  C_p = (1/n) Z_j^T Z_k for each pair p = (j, k);  each column of C_p divided by max(its norm, eps)
        r = conv(GELU(conv(C))), both 3x3, stride 2, without padding or bias, over the pairs as channels
        logits = combine(W1 v + b1, W2 r + b2), v the mean token, the last one, or the first (a class token)

    Padded positions are set to zero before any arithmetic and again after the LayerNorm, and n is the example's own.

    Args:
        width: d.
        classes: Number of logits.
        order: 1 leaves the second branch out: a linear probe.
        hidden: h = H q, channels of the projection.
        heads: H.
        pairing: See `pairs`.
        centre: ``tokens``: less the mean over valid tokens, a true cross-covariance. ``scalar``: less one number for
            each example and head, what the authors' code does, so that the paper's figures belong to it; with unit gain
            and zero bias of the LayerNorm it equals ``none``, the second moment as it is.
        norm: ``column_l2``; ``signed_sqrt``, over the whole vector; ``isqrt``, for ``pairing="self"``; ``none``.
        conv: Whether the maps go through the two convolutions; they need q of at least 7.
        combine: ``mean`` of the branches (paper), ``sum`` (the second starts at zero: it begins as a linear probe), or
            ``learned`` factors.
        first: What v is. With ``cls`` the first token is left out of the second branch.
        first_norm: eps of a LayerNorm on v, None for none (the authors' head for convolutional networks has one).
        eps: Smallest norm of a column.

    Raises:
        ArgumentError: If the sizes or choices do not fit together.

    Example:
        >>> head = MomentHead(768, 1000)
        >>> sum(p.numel() for p in head.parameters())
        4047146
    """

    centre: Centre
    first: First

    def __init__(
        self, width: int, classes: int, *, order: Literal[1, 2] = 2, hidden: int = 512, heads: int = 4,
        pairing: Pairing = "near", centre: Centre = "tokens", norm: MapNorm = "column_l2", conv: bool = True,
        combine: Combine = "mean", first: First = "mean", first_norm: float | None = None, eps: float = 1e-6,
    ):  # fmt: skip
        super().__init__()
        _check(
            order=(order, (1, 2)),
            centre=(centre, ("tokens", "scalar", "none")),
            first=(first, ("mean", "last", "cls")),
            norm=(norm, ("column_l2", "signed_sqrt", "isqrt", "none")),
            combine=(combine, ("mean", "sum", "learned")),
        )
        self.order, self.centre, self.norm = order, centre, norm
        self.combine, self.first, self.eps = combine, first, eps
        self.heads = heads
        self.first_norm = nn.LayerNorm(width, eps=first_norm) if first_norm is not None else None
        self.classifier1 = nn.Linear(width, classes)
        if order == 1:
            return
        self.pairs = pairs(heads, pairing)
        size = head_size(hidden, heads, conv)
        if norm == "isqrt" and pairing != "self":
            raise ArgumentError(f'norm="isqrt" with pairing={pairing!r}', "symmetric maps",
                                'pairing="self", or norm="column_l2"')  # fmt: skip
        count = len(self.pairs)
        side = _after(_after(size)) if conv else size
        self.proj, self.ln = nn.Linear(width, hidden), nn.LayerNorm(size)
        self.down = nn.Sequential(
            nn.Conv2d(count, count, 3, stride=2, bias=False), nn.GELU(),
            nn.Conv2d(count, count, 3, stride=2, bias=False),
        ) if conv else nn.Identity()  # fmt: skip
        self.classifier2 = nn.Linear(count * side**2, classes)
        if combine == "sum":
            nn.init.zeros_(self.classifier2.weight)
            nn.init.zeros_(self.classifier2.bias)
        if combine == "learned":
            self.factors = nn.Parameter(torch.full((2,), 0.5))

    def forward(
        self, features: Float[Tensor, "batch T d"], mask: Bool[Tensor, "batch T"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits.

        Args:
            features: Padded tokens.
            mask: True where a token is valid; all are by default.
        """
        features, mask = self._clean(features, mask)
        first = self.classifier1(self._first(features, mask))
        if self.order == 1:
            return first
        second = self.classifier2(self.down(self._maps(features, mask)).flatten(1))
        if self.combine == "learned":
            return self.factors[0] * first + self.factors[1] * second
        return (first + second) / 2 if self.combine == "mean" else first + second

    def maps(
        self, features: Float[Tensor, "batch T d"], mask: Bool[Tensor, "batch T"] | None = None
    ) -> Float[Tensor, "batch pairs q q"]:
        """Normalised cross-covariances, before the convolutions: axes are channels of the first and second head."""
        return self._maps(*self._clean(features, mask))

    def pooled(self, features: Float[Tensor, "batch T d"], mask: Bool[Tensor, "batch T"]) -> Float[Tensor, "batch d"]:
        """v, what the first branch is linear in."""
        return self._first(*self._clean(features, mask))

    @torch.no_grad()
    def start_at(self, weight: Float[Tensor, "classes d"], bias: Float[Tensor, "classes"]) -> None:
        """Let the head be this linear probe of v: the second branch gives zero until it is trained."""
        share = 1.0
        if self.order == 2:
            nn.init.zeros_(self.classifier2.weight)
            nn.init.zeros_(self.classifier2.bias)
            share = {"mean": 0.5, "sum": 1.0, "learned": 0.5}[self.combine]
        self.classifier1.weight.copy_(weight / share)
        self.classifier1.bias.copy_(bias / share)

    def _clean(self, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        features = features.masked_fill(~mask[..., None], 0)  # not a product: 0 * NaN is NaN
        return features.to(self.classifier1.weight.dtype), mask

    def _first(self, features: Tensor, mask: Tensor) -> Tensor:
        if self.first == "mean":
            v = features.sum(1) / mask.sum(1, keepdim=True)
        else:
            v = features[torch.arange(len(features), device=features.device), self._place(mask, self.first)]
        return self.first_norm(v) if self.first_norm is not None else v

    @staticmethod
    def _place(mask: Tensor, which: str) -> Tensor:
        first = mask.int().argmax(1)
        return first if which == "cls" else mask.shape[1] - 1 - mask.flip(1).int().argmax(1)

    def _maps(self, features: Tensor, mask: Tensor) -> Tensor:
        if self.first == "cls":
            place = torch.arange(mask.shape[1], device=mask.device)
            mask = mask & (place != self._place(mask, "cls")[:, None])
            features = features.masked_fill(~mask[..., None], 0)
        hidden = ~mask[:, :, None, None]
        z = self.ln(self.proj(features).unflatten(2, (self.heads, -1))).masked_fill(hidden, 0)
        count = mask.sum(1).clamp(min=1)[:, None, None, None]
        if self.centre == "tokens":
            z = (z - z.sum(1, keepdim=True) / count).masked_fill(hidden, 0)
        elif self.centre == "scalar":
            z = (z - z.sum((1, 3), keepdim=True) / (count * z.shape[3])).masked_fill(hidden, 0)
        left, right = (z[:, :, list(side)] for side in zip(*self.pairs, strict=True))
        maps = left.permute(0, 2, 3, 1) @ right.permute(0, 2, 1, 3) / count
        if self.norm == "column_l2":
            return column_l2(maps, self.eps)
        if self.norm == "signed_sqrt":
            return signed_sqrt(maps.flatten(1)).view(maps.shape)
        return newton_schulz(maps) if self.norm == "isqrt" else maps

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor], **options) -> "MomentHead":
        """A head with weights in the layout of the authors' code, whatever stands before the names.

        Heads for transformers have ``classifier1`` and a linear ``proj``, and read the class token; those for
        convolutional networks and MLPs have ``cls_head.fc`` (and ``cls_head.norm``), a 1x1 convolution ``proj`` whose
        channel c belongs to head c mod H, and read the mean. They centre by ``scalar``.

        Args:
            state: Names and tensors, as ``torch.load(file, weights_only=True)`` gives them.
            options: Options of `MomentHead` that differ: the released classifiers fit 3 maps of 128 channels.

        Raises:
            ArgumentError: If tensors of the layout are missing, or do not fit.
        """
        found = [key for key in state if key.endswith("downblocks.0.0.weight")]
        if len(found) != 1:
            raise ArgumentError(f"{len(found)} tensors named downblocks.0.0.weight", "exactly one moment head")
        start = found[0].removesuffix("downblocks.0.0.weight")
        own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        missing = _RELEASED - set(own)
        convolutional = "cls_head.fc.weight" in own
        linear = "cls_head.fc" if convolutional else "classifier1"
        if missing or f"{linear}.weight" not in own:
            raise ArgumentError(f"a state without {', '.join(sorted(missing)) or linear}", "a released moment head")
        hidden, width = own["proj.weight"].shape[:2]
        size = len(own["ln.weight"])
        settings = {"centre": "scalar", "first": "mean" if convolutional else "cls", "eps": 1e-12,
                    "first_norm": 1e-6 if "cls_head.norm.weight" in own else None} | options  # fmt: skip
        head = cls(width, len(own[f"{linear}.weight"]), hidden=hidden, heads=hidden // size, **settings)
        order = torch.arange(hidden).view(size, -1).T.flatten() if convolutional else torch.arange(hidden)
        new = {
            "proj.weight": own["proj.weight"].flatten(1)[order], "proj.bias": own["proj.bias"][order],
            "down.0.weight": own["downblocks.0.0.weight"], "down.2.weight": own["downblocks.0.2.weight"],
            "classifier1.weight": own[f"{linear}.weight"], "classifier1.bias": own[f"{linear}.bias"],
        } | {key: own[key] for key in ("ln.weight", "ln.bias", "classifier2.weight", "classifier2.bias")}  # fmt: skip
        if "cls_head.norm.weight" in own:
            new |= {f"first_norm.{name}": own[f"cls_head.norm.{name}"] for name in ("weight", "bias")}
        expected = {key: tuple(value.shape) for key, value in head.state_dict().items()}
        shapes = {key: tuple(value.shape) for key, value in new.items()}
        if shapes != expected:
            wrong = {key: shapes.get(key) for key in expected if shapes.get(key) != expected[key]}
            raise ArgumentError(f"tensors of other shapes: {wrong}", f"{ {key: expected[key] for key in wrong} }")
        head.load_state_dict(new)
        return head.eval()


_RELEASED = {"proj.weight", "proj.bias", "ln.weight", "ln.bias", "downblocks.0.0.weight", "downblocks.0.2.weight",
             "classifier2.weight", "classifier2.bias"}  # fmt: skip


def head_size(hidden: int, heads: int, conv: bool) -> int:
    """q = hidden / heads.

    Raises:
        ArgumentError: If it is not whole, or too small for two convolutions.
    """
    if heads < 1 or hidden < 1 or hidden % heads:
        raise ArgumentError(f"hidden={hidden} with heads={heads}", "a multiple of the heads")
    size = hidden // heads
    if conv and size < 7:
        given = f"{size} channels in each of {heads} heads (hidden={hidden})"
        raise ArgumentError(given, "at least 7 for two 3x3 convolutions of stride 2", "conv=False, or a larger hidden")
    return size


def _after(size: int) -> int:
    return (size - 3) // 2 + 1


def _check(**choices) -> None:
    for name, (value, legal) in choices.items():
        if value not in legal:
            raise ArgumentError(f"{name}={value!r}", f"one of {', '.join(map(str, legal))}")
