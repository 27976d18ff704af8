"""MomentProbe: the moment head as an estimator."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from interp.hooks.errors import ArgumentError
from interp.probes.estimator import SkipFirst
from interp.probes.moment_head import Combine, First, MapNorm, MomentHead, Pairing, head_size
from interp.probes.moments import Centre, check_lone_tokens
from interp.probes.tokens import TokenSets
from interp.probes.trained import Start, TrainedTokenProbe

FEW = 5000


class MomentProbe(TrainedTokenProbe):
    """Moment probing: a trained classifier of the mean and of cross-covariances of an example's tokens (`MomentHead`).

    Tokens are standardised per channel with the training tokens. The epoch is chosen on an inner validation part. In
    decoder language models the first token is an attention sink and is left out; see ``skip_first``.

    With one token in every example a covariance over tokens is zero: ``centre="none"`` then gives the bilinear probe of
    a vector, and the default is refused.

    Source: Gao et al., "Tuning Pre-trained Model via Moment Probing", ICCV 2023 (arXiv 2307.11342).

    Args:
        order: 1 for the first branch alone.
        hidden: Channels of the projection; ``auto`` is 128 for fewer than 5,000 training examples, else 512.
        heads: Heads that the channels are cut into.
        pairing: Which heads are correlated.
        centre: ``tokens``, ``scalar`` (as the authors' code) or ``none``.
        norm: Normalisation of the maps.
        conv: Whether the maps go through two convolutions.
        first: ``mean``, ``last`` or ``cls``, which reads the first token and leaves it out of the second branch.
        combine: How the branches are put together.
        epochs: Most epochs.
        lr: Highest learning rate.
        weight_decay: On matrices.
        batch_size: Most examples in a step; fewer, 8 at least, where an epoch would have less than ten steps.
        validation: Share of the examples that chooses the epoch; 0 trains all epochs on everything.
        patience: Epochs without improvement after which training stops.
        class_weight: None, ``balanced`` or a dict.
        skip_first: Whether the first token of each example is left out; ``auto`` where it is an attention sink, with a
            warning that says so. The choice is kept in ``skip_first_``.
        start: ``linear``: the head begins as the convex linear probe, its second branch at zero; ``random``, as in the
            paper. From a random start a second branch on few examples can drown what is in the mean.
        random_state: A seed, or (initialisation, order, split).

    Attributes:
        head_: The trained `MomentHead`, in float64.
        median_tokens_: Median number of tokens; a covariance's rank is at most one less.
        parameters_: Number of trained parameters, projection included.

    Example:
        >>> import torch
        >>> X = torch.randn(40, 6, 5)
        >>> y = (X[:, :, 0].mean(1) > 0).long()
        >>> MomentProbe(hidden=28, epochs=2).fit(X, y).predict_proba(X).shape
        torch.Size([40, 2])
    """

    order: Literal[1, 2]
    pairing: Pairing
    centre: Centre
    norm: MapNorm
    first: First
    combine: Combine
    first_norm_: float | None
    eps_: float

    def __init__(
        self, order: Literal[1, 2] = 2, *, hidden: int | Literal["auto"] = "auto", heads: int = 4,
        pairing: Pairing = "near", centre: Centre = "tokens", norm: MapNorm = "column_l2", conv: bool = True,
        first: First = "mean", combine: Combine = "mean", epochs: int = 30, lr: float = 1e-3,
        weight_decay: float = 0.05, batch_size: int = 64, validation: float = 0.15, patience: int = 10,
        class_weight: Any = None, skip_first: SkipFirst = "auto", start: Start = "linear", random_state: Any = 0,
    ):  # fmt: skip
        self.order, self.hidden, self.heads, self.pairing = order, hidden, heads, pairing
        self.centre, self.norm, self.conv, self.first, self.combine = centre, norm, conv, first, combine
        self.epochs, self.lr, self.weight_decay, self.batch_size = epochs, lr, weight_decay, batch_size
        self.validation, self.patience, self.class_weight = validation, patience, class_weight
        self.skip_first, self.start, self.random_state = skip_first, start, random_state

    def fit(self, X: Any, y: Any, mask: Any = None, groups: Any = None) -> "MomentProbe":
        """Train on token sets.

        Args:
            X: `TokenSets`, a list of [tokens, d], [n, T, d] with a mask, or [n, d], one token each.
            y: Labels.
            mask: [n, T], True where a token is valid.
            groups: [n]; the inner validation part keeps a group together.

        Raises:
            ArgumentError: If sizes or choices do not fit, or every example has one token and ``centre`` is ``tokens``.
        """
        self._check_sizes()
        sets = self._inputs(X, mask, fitting=True)
        if self.order == 2:
            check_lone_tokens(sets, self.centre)
        self.median_tokens_ = float(sets.lengths.double().median())
        self.hidden_ = (128 if len(sets) < FEW else 512) if self.hidden == "auto" else int(self.hidden)
        self.first_norm_, self.eps_ = None, 1e-6
        self._fit_head(sets, y, self.class_weight, groups)
        self.parameters_ = sum(p.numel() for p in self.head_.parameters())
        return self

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor], classes: Sequence[Any], **options: Any) -> "MomentProbe":
        """A probe with weights in the layout of the authors' code; see `MomentHead.from_released`.

        Features are not standardised. X holds the class token as its first one where the head reads it.

        Args:
            state: Names and tensors.
            classes: Labels, in the order of the logits.
            options: Options of `MomentHead` that differ from the released ones.

        Raises:
            ArgumentError: If tensors are missing or do not fit, or there is not one class for each logit.
        """
        head = MomentHead.from_released(state, **options)
        width = head.classifier1.in_features
        if len(classes) != head.classifier1.out_features:
            raise ArgumentError(f"{len(classes)} classes for {head.classifier1.out_features} logits", "one for each")
        probe = cls(
            hidden=head.proj.out_features, heads=head.heads, skip_first=False, centre=head.centre, first=head.first
        )
        probe.set_params(**{key: value for key, value in options.items() if key in probe.get_params()})
        probe.classes_, probe.n_features_in_, probe.skip_first_ = np.asarray(classes), width, False
        probe.mean_, probe.std_ = np.zeros(width), np.ones(width)
        probe.hidden_, probe.head_ = head.proj.out_features, head.double()
        probe.first_norm_ = head.first_norm.eps if head.first_norm is not None else None
        probe.eps_ = head.eps
        return probe

    def _check_sizes(self) -> None:
        if self.order == 2 and self.hidden != "auto":
            head_size(int(self.hidden), self.heads, self.conv)

    def _inputs(self, X: Any, mask: Any, *, fitting: bool = False) -> TokenSets:
        if self.first == "cls" and self.skip_first is True:
            raise ArgumentError('skip_first=True with first="cls"', "the first token", "skip_first=False")
        if self.first != "cls":
            return super()._inputs(X, mask, fitting=fitting)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sets = super()._inputs(X, mask, fitting=False) if not fitting else self._whole(X, mask)
        if self.order == 2 and int(sets.lengths.min()) < 2:
            raise ArgumentError("an example of one token", 'with first="cls" at least one token beside the class token')
        return sets

    def _whole(self, X: Any, mask: Any) -> TokenSets:
        chosen, self.skip_first = self.skip_first, False
        sets = super()._inputs(X, mask, fitting=True)
        self.skip_first = chosen
        return sets

    def _module(self) -> nn.Module:
        return MomentHead(
            self.n_features_in_, len(self.classes_), order=self.order, hidden=self.hidden_, heads=self.heads,
            pairing=self.pairing, centre=self.centre, norm=self.norm, conv=self.conv, combine=self.combine,
            first=self.first, first_norm=self.first_norm_, eps=self.eps_,
        )  # fmt: skip

    def _values_per_example(self) -> int:
        return self.heads * (self.hidden_ // self.heads) ** 2 * 4 if self.order == 2 else 0
