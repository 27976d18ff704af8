"""What all probes share: the scikit-learn interface, labels, inputs, answers. The one file that imports scikit-learn.

scikit-learn's base classes are needed where classes are defined. `import interp` does not come here.
"""

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin, is_regressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn

from interp.hooks.errors import ArgumentError
from interp.probes.tokens import FirstTokenWarning, Pool, TokenSets, as_token_sets, is_token_input

SkipFirst = bool | Literal["auto"]
POOLS_OVER_TOKENS = ("mean", "max")

__all__ = ["BaseEstimator", "ConvergenceWarning", "Probe", "RegressorMixin", "TokenInputs", "TokenProbe",
           "TransformerMixin", "VectorProbe", "check_is_fitted",
           "column_or_1d", "is_regressor"]  # fmt: skip


class Probe(ClassifierMixin, BaseEstimator):
    """A classifier on activations. Subclasses give `fit` and `_logits`.

    Answers are numpy arrays, or tensors on the same device where X is a tensor or `TokenSets`.
    """

    classes_: np.ndarray
    n_features_in_: int

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _logits(self, inputs: Any) -> Tensor:
        """[n] for two classes, [n, classes] for more."""
        raise NotImplementedError

    def _inputs(self, X: Any, mask: Any, *, fitting: bool = False) -> Any:
        raise NotImplementedError

    def decision_function(self, X: Any, mask: Any = None) -> Any:
        """Logits: [n] for two classes (positive for the second), [n, classes] for more."""
        check_is_fitted(self)
        return as_answer(X, self._logits(self._inputs(X, mask)))

    def predict_proba(self, X: Any, mask: Any = None) -> Any:
        """Probabilities [n, classes], in the order of ``classes_``."""
        check_is_fitted(self)
        return as_answer(X, self._probabilities(self._inputs(X, mask)))

    def _probabilities(self, inputs: Any) -> Tensor:
        logits = self._logits(inputs)
        if logits.ndim == 1:
            return torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], 1)
        return torch.softmax(logits, 1)

    def predict(self, X: Any, mask: Any = None) -> Any:
        """The class of each example (a tensor where X is one and the classes are numbers)."""
        check_is_fitted(self)
        logits = self._logits(self._inputs(X, mask))
        index = (logits > 0).long() if logits.ndim == 1 else logits.argmax(1)
        if _is_torch(X) and self.classes_.dtype.kind in "biuf":
            return torch.as_tensor(self.classes_, device=index.device)[index]
        return self.classes_[index.cpu().numpy()]

    def score(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None) -> float:
        """Accuracy.

        Raises:
            ArgumentError: If y holds a label that was not seen in fitting, or has another length than X.
        """
        check_is_fitted(self)
        labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
        unknown = sorted(set(labels.tolist()) - set(self.classes_.tolist()), key=str)
        if unknown:
            raise ArgumentError(f"labels {unknown[:10]} in y", f"labels among {self.classes_.tolist()[:20]}")
        predicted = self.predict(X, mask)
        predicted = predicted.cpu().numpy() if isinstance(predicted, Tensor) else predicted
        check_lengths(len(predicted), y=labels)
        return float(np.average(predicted == labels, weights=sample_weight))

    def _labels(self, y: Any, n: int) -> Int64[Tensor, "n"]:
        """Set ``classes_`` and give y as numbers.

        Raises:
            ArgumentError: If y is not a vector of n labels of at least two classes.
        """
        if y is None:
            raise ArgumentError(f"{type(self).__name__} requires y to be passed, but the target y is None", "labels")
        y = column_or_1d(y.cpu().numpy() if isinstance(y, Tensor) else y, warn=True)
        check_classification_targets(y)
        check_lengths(n, y=y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ArgumentError(f"y holds 1 class: {self.classes_.tolist()}", "at least 2 classes")
        return torch.as_tensor(index.astype(np.int64))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that fitted attributes must have to fit together; checked when a file is read."""
        return {}

    def _module(self) -> nn.Module:
        """The network of a probe that has one, sized by its parameters and fitted attributes, with any weights."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the fitted probe to one safetensors file with a JSON header; see `interp.probes.saving.save_probe`."""
        from interp.probes.saving import save_probe

        save_probe(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """Read a probe that `save` wrote.

        Raises:
            ArgumentError: If the file holds a probe of another class than the one that is asked for.
        """
        from interp.probes.saving import load_probe

        probe = load_probe(path)
        if not isinstance(probe, cls):
            raise ArgumentError(f"{path} holds a {type(probe).__name__}", f"a {cls.__name__}")
        return probe


class VectorProbe(Probe):
    """A probe on one vector for each example; token sets are pooled with ``pool``."""

    pool: Pool
    skip_first: SkipFirst

    def _inputs(self, X: Any, mask: Any, *, fitting: bool = False) -> Float[Tensor, "n d"]:
        if is_token_input(X):
            return self._pooled(X, mask, fitting)
        if mask is not None:
            raise ArgumentError("a mask for features that are not [examples, tokens, d]", "no mask")
        if isinstance(X, Tensor) and X.ndim == 2:
            values = as_token_sets(X).values.double()
            check_width(self, values.shape[1], fitting)
        else:
            values = torch.as_tensor(validate_data(self, X, reset=fitting, dtype=np.float64))  # pyright: ignore[reportArgumentType]
        if fitting:
            self.skip_first_ = False
        return values

    def _pooled(self, X: Any, mask: Any, fitting: bool) -> Float[Tensor, "n d"]:
        sets = as_token_sets(X, mask)
        check_width(self, sets.width, fitting)
        if fitting:
            over = self.pool in POOLS_OVER_TOKENS
            self.skip_first_ = decide_first(sets, self.skip_first) if over else False
        return (sets.without_first() if self.skip_first_ else sets).pooled(self.pool)

    def _fit_inputs(self, X: Any, y: Any, mask: Any, sample_weight: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, numbered labels and weights of the examples whose weight is not zero."""
        vectors = self._inputs(X, mask, fitting=True)
        weights = sample_weights(sample_weight, vectors)
        kept = weights > 0
        vectors, weights = vectors[kept], weights[kept]
        if y is not None and not bool(kept.all()):
            check_lengths(len(kept), y=y)
            y = np.asarray(y.cpu() if isinstance(y, Tensor) else y)[kept.cpu().numpy()]
        return vectors, self._labels(y, len(vectors)).to(vectors.device), weights


class TokenInputs:
    """Sets of tokens as input; a matrix [n, d] is taken as one token for each example."""

    skip_first: SkipFirst
    n_features_in_: int

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.three_d_array = True
        return tags

    def _inputs(self, X: Any, mask: Any, *, fitting: bool = False) -> TokenSets:
        if not is_token_input(X) and not isinstance(X, Tensor):
            X = validate_data(self, X, reset=fitting, dtype=[np.float64, np.float32])
        sets = as_token_sets(X, mask)
        check_width(self, sets.width, fitting)
        if fitting:
            self.skip_first_ = decide_first(sets, self.skip_first)
        return sets.without_first() if self.skip_first_ else sets


class TokenProbe(TokenInputs, Probe):
    """A probe on sets of tokens."""


def decide_first(sets: TokenSets, skip_first: Any) -> bool:
    """Whether the first token of each example is left out; where that is decided from the data, a warning says so.

    Raises:
        ArgumentError: If ``skip_first`` is not True, False or "auto".
    """
    if skip_first not in (True, False, "auto"):
        raise ArgumentError(f"skip_first={skip_first!r}", "True, False or 'auto'")
    if skip_first != "auto":
        return bool(skip_first)
    found = sets.has_sink()
    if found:
        text = (
            "first tokens have at least 5 times the norm of the others (an attention sink): they are left out of "
            "means and moments; skip_first=True says that you know, skip_first=False keeps them"
        )
        warnings.warn(text, FirstTokenWarning, stacklevel=5)
    return found


def check_lengths(n: int, **others: Any) -> None:
    """Refuse what does not have one entry for each of n examples.

    Raises:
        ArgumentError: With both numbers.
    """
    for name, value in others.items():
        if value is not None and len(value) != n:
            raise ArgumentError(f"{name} of length {len(value)} for {n} examples", "one entry for each example")


def check_width(probe: Any, width: int, fitting: bool) -> None:
    """Set, or compare, the number of features.

    Raises:
        ArgumentError: If it is another one than in fitting.
    """
    if fitting:
        probe.n_features_in_ = width
    elif width != probe.n_features_in_:
        raise ArgumentError(
            f"X has {width} features, but {type(probe).__name__} is expecting {probe.n_features_in_} features as input",
            "the width that it was fitted with",
        )


def sample_weights(sample_weight: Any, like: Tensor) -> Float[Tensor, "n"]:
    """Weights in float64 on the features' device, ones by default."""
    if sample_weight is None:
        return torch.ones(len(like), dtype=torch.float64, device=like.device)
    if isinstance(sample_weight, Tensor):
        sample_weight = sample_weight.cpu().numpy()
    shape = np.empty((len(like), 1))
    checked = _check_sample_weight(sample_weight, shape, dtype=np.float64, ensure_non_negative=True)
    return torch.as_tensor(checked, device=like.device)


def balanced(labels: Tensor, weights: Tensor, class_weight: Any, classes: np.ndarray) -> Float[Tensor, "n"]:
    """Weights times the weight of each example's class: none, ``balanced`` or a dict from label to weight.

    Raises:
        ArgumentError: If a dict names a label that y does not hold.
    """
    if class_weight is None:
        return weights
    if class_weight == "balanced":
        totals = torch.zeros(len(classes), dtype=weights.dtype, device=weights.device).index_add_(0, labels, weights)
        return weights * (totals.sum() / (len(classes) * totals))[labels]
    if not isinstance(class_weight, dict) or set(class_weight) - set(classes.tolist()):
        raise ArgumentError(f"class_weight={class_weight!r}", f"None, 'balanced' or weights of {classes.tolist()}")
    factors = torch.tensor([float(class_weight.get(c, 1.0)) for c in classes.tolist()], dtype=weights.dtype)
    return weights * factors.to(weights.device)[labels]


def _is_torch(X: Any) -> bool:
    return isinstance(X, (Tensor, TokenSets)) or (isinstance(X, (list, tuple)) and bool(X) and isinstance(X[0], Tensor))


def as_array(tensor: Tensor) -> np.ndarray:
    """A fitted tensor as a C-ordered array: products are the same, bit for bit, after it has been to a file."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def as_answer(X: Any, answer: Tensor) -> Any:
    """The answer as a tensor where X is one, else as an array."""
    return answer if _is_torch(X) else answer.cpu().numpy()
