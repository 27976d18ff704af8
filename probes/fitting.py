"""Fitting any scikit-learn classifier, ours or not, on parts of a data set."""

import inspect
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.probes.estimator import ConvergenceWarning, check_lengths
from interp.probes.tokens import TokenSets


def count(X: Any) -> int:
    """Number of examples.

    Raises:
        ArgumentError: If X has no examples.
    """
    if not hasattr(X, "__len__") or not len(X):
        raise ArgumentError(f"X of type {type(X).__name__}", "arrays, tensors, TokenSets or a list of [tokens, d]")
    return len(X)


def check_finite(X: Any, site: str) -> None:
    """Refuse NaN and infinity, naming the site. Padded sets and lists are checked by the probes, which have the mask.

    Raises:
        ArgumentError: With the first bad example and the number of them.
    """
    values = X.values if isinstance(X, TokenSets) else X
    if isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) != 2:
        return
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    place = int(np.searchsorted(X.offsets.cpu(), bad[0], side="right")) - 1 if isinstance(X, TokenSets) else int(bad[0])
    raise ArgumentError(f"NaN or infinity in {len(bad)} rows of {site}, first at example {place}", "finite features",
                        "extract them in float32, or leave the examples out")  # fmt: skip


def take(X: Any, index: np.ndarray) -> Any:
    """The examples at these places."""
    if isinstance(X, TokenSets):
        return X.take(torch.as_tensor(index))
    if isinstance(X, Tensor):
        return X[torch.as_tensor(index, device=X.device)]
    return [X[i] for i in index] if isinstance(X, (list, tuple)) else X[index]


def as_numbers(y: Any, X: Any) -> tuple[Int64[np.ndarray, "n"], np.ndarray]:
    """Class numbers, and the classes in order.

    Raises:
        ArgumentError: If y has another length than X, or is not a vector.
    """
    labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    if labels.ndim != 1:
        raise ArgumentError(f"y of shape {list(labels.shape)}", "one label for each example")
    check_lengths(count(X), y=labels)
    classes, numbers = np.unique(labels, return_inverse=True)
    return numbers.astype(np.int64), classes


def fit(probe: Any, X: Any, y: Num[np.ndarray, "n"], groups: Any = None, seed: int | None = None) -> Any:
    """A fitted clone; groups reach its own inner splits, the seed its ``random_state``.

    A fit that did not converge says so in ``converged_``, not in a warning for each fold.
    """
    from sklearn.base import clone

    made: Any = clone(probe)
    if seed is not None:
        seeds = [name for name in made.get_params() if name.rpartition("__")[2] == "random_state"]
        made.set_params(**dict.fromkeys(seeds, seed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(X, y, **_group_arguments(made, groups))
    failed = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
    for other in (w for w in caught if w not in failed):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if not hasattr(made, "converged_"):
        made.converged_ = not failed
    return made


def _group_arguments(made: Any, groups: Any) -> dict[str, Any]:
    """Groups as ``fit`` takes them: by name, by the name of a pipeline's last step, or not at all."""
    if groups is None:
        return {}
    if hasattr(made, "steps"):
        name, last = made.steps[-1]
        return {f"{name}__{key}": value for key, value in _group_arguments(last, groups).items()}
    takes = "groups" in inspect.signature(made.fit).parameters or type(made).__name__.endswith("SearchCV")
    return {"groups": groups} if takes else {}


def probabilities(probe: Any, X: Any, classes: int) -> Float[np.ndarray, "n classes"]:
    """Probabilities of all classes 0..classes-1; a class that was not in training gets none.

    Of an estimator without probabilities: softmax of its decision function, or certainty of what it predicts.
    """
    if hasattr(probe, "predict_proba"):
        found = _array(probe.predict_proba(X))
    elif hasattr(probe, "decision_function"):
        logits = _array(probe.decision_function(X))
        logits = np.stack([-logits / 2, logits / 2], 1) if logits.ndim == 1 else logits
        powers = np.exp(logits - logits.max(1, keepdims=True))
        found = powers / powers.sum(1, keepdims=True)
    else:
        found = (_array(probe.predict(X))[:, None] == np.asarray(probe.classes_)).astype(np.float64)
    whole = np.zeros((len(found), classes))
    whole[:, np.asarray(probe.classes_, dtype=np.int64)] = found
    return whole


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
