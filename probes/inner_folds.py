"""Folds for choices that a probe makes inside its training part."""

import warnings

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp.hooks.errors import ArgumentError

MOST_FOLDS = 5


def inner_folds(
    vectors: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], groups: object, folds: int | None, seed: int
) -> Int64[Tensor, "n"]:
    """The fold of each example: stratified, equal rows together, and the same for any order of the rows.

    Equal rows in two folds would let a probe see what it is tested on; so they share one, as groups do. By default
    there are as many folds as the smallest class has distinct rows, five at most; a class of one distinct row is in
    every training part (fold -1). With groups, by default as many, five at most, as leave every class in every training
    part.

    Raises:
        ArgumentError: If no class can be split, or a class has fewer distinct rows than the folds that are asked for.
    """
    if groups is not None:
        return _group_folds(labels, groups, folds, seed)
    rows, row_of = np.unique(vectors.cpu().numpy(), axis=0, return_inverse=True)
    row_of, y = row_of.reshape(-1), labels.cpu().numpy()
    first = np.full(len(rows), y.max() + 1)
    np.minimum.at(first, row_of, y)
    counts = np.bincount(first, minlength=y.max() + 1)
    alone = counts == 1 if folds is None else np.zeros(len(counts), dtype=bool)
    if folds is None:
        folds = int(min(MOST_FOLDS, *counts[~alone])) if not alone.all() else 1
    if folds < 2 or counts[~alone].min() < folds:
        raise ArgumentError(
            f"classes with {counts.tolist()} distinct examples for {folds} folds",
            "at least 2 folds, and as many examples of each class as folds", "give C as a number, or fewer folds",
        )  # fmt: skip
    fold, start = np.full(len(rows), -1), 0
    for k in np.flatnonzero(~alone):
        members = np.random.default_rng(seed + k).permutation(np.flatnonzero(first == k))
        fold[members] = (start + np.arange(len(members))) % folds
        start += len(members)
    return torch.as_tensor(fold[row_of], device=labels.device)


def label_folds(labels: Int64[Tensor, "n"], groups: object, folds: int, seed: int) -> Int64[Tensor, "n"]:
    """The fold of each example where rows cannot be compared: stratified, with groups together.

    Raises:
        ArgumentError: If a class has fewer examples than folds, or a training part would lack one.
    """
    if groups is not None:
        return _group_folds(labels, groups, folds, seed)
    counts = torch.bincount(labels)
    if folds < 2 or int(counts.min()) < folds:
        raise ArgumentError(f"classes with {counts.tolist()} examples for {folds} folds", "at least 2 folds, and as "
                            "many examples of each class as folds", "give C as a number, or fewer folds")  # fmt: skip
    fold, start = torch.empty_like(labels), 0
    for k, count in enumerate(counts.tolist()):
        members = torch.as_tensor(np.random.default_rng(seed + k).permutation(count))
        fold[(labels == k).nonzero().flatten()[members]] = (start + torch.arange(count)) % folds
        start += count
    return fold


def _group_folds(labels: Tensor, groups: object, folds: int | None, seed: int) -> Tensor:
    y, names = labels.cpu().numpy(), np.asarray(groups)
    if len(names) != len(y):
        raise ArgumentError(f"groups of length {len(names)} for {len(y)} examples", "one group for each example")
    most = min(folds or MOST_FOLDS, len(np.unique(names)))
    if most < 2:
        raise ArgumentError("all examples in one group", "at least 2 groups")
    for count in (most,) if folds is not None else range(most, 1, -1):
        found = _one_group_split(y, names, count, seed)
        if found is not None:
            return torch.as_tensor(found, device=labels.device)
    raise ArgumentError("a fold whose training part lacks a class", "groups that share the classes",
                        "give C as a number, or fewer folds")  # fmt: skip


def _one_group_split(y: np.ndarray, names: np.ndarray, folds: int, seed: int) -> np.ndarray | None:
    """The fold of each example; None where a training part would lack a class."""
    from sklearn.model_selection import StratifiedGroupKFold

    fold = np.empty(len(y), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        for k, (kept, held) in enumerate(splitter.split(y, y, names)):
            fold[held] = k
            if not len(held) or len(np.unique(y[kept])) < len(np.unique(y)):
                return None
    return fold
