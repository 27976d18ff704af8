"""Outputs in parts: how much of each class's or token's score is F x, and how much is r."""

from interp.hooks.errors import ArgumentError
from interp.hooks.linear_scope import LinearScope
from interp.hooks.table import Table


def output_parts(scope: LinearScope, top: int = 8, *, position: int = -1, centred: bool = True) -> Table:
    """Return F (x - o) and r + F o of the largest outputs, whose sum is y, o being the origin of the input space.

    Rows are the ``top`` largest of y, then, where they are not among them, the largest of F x alone and of r alone.
    Scores that end in a softmax have a free shift that all share; ``centred`` takes the mean over all outputs out of
    each part, and out of their sum with it.

    Args:
        scope: A network with scores [class] or [pos, token] as its output.
        top: How many outputs.
        position: Of tokens, whose next.
        centred: Whether each part is without its mean over outputs.

    Returns:
        A table with the columns class, token or output; index; F x; r; sum.

    Raises:
        ArgumentError: If the output is neither, the position does not exist, or top is not positive.

    Source: Navarrete Michelini et al., ICCV 2019 (that classifiers rely on biases).

    Example:
        >>> import interp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> table = output_parts(interp.LinearScope(interp.attach(net), torch.randn(1, 4)), top=2)
        >>> all(abs(row["F x"] + row["r"] - row["sum"]) < 1e-5 for row in table)
        True
    """
    if scope.y.ndim not in (2, 3) or top < 1:
        raise ArgumentError(f"the {top} largest of outputs {list(scope.out_shape)}", "classes, or tokens at positions")
    if scope.y.ndim == 3 and not -scope.y.shape[1] <= position < scope.y.shape[1]:
        raise ArgumentError(f"position {position}", f"an output position of {scope.y.shape[1]}")
    moved = scope.matvec(scope.origin[0])
    parts = {"F x": scope.Fx[0] - moved, "r": scope.r[0] + moved, "sum": scope.y[0]}
    parts = {name: (part if part.ndim == 1 else part[position]).double() for name, part in parts.items()}
    if centred:
        parts = {name: part - part.mean() for name, part in parts.items()}
    shown = parts["sum"].topk(min(top, len(parts["sum"]))).indices.tolist()
    shown += [int(part.argmax()) for part in parts.values() if part.max() > part.min()]
    kind, name = _names(scope)
    rows = [{kind: name(k), "index": k, **{n: float(p[k]) for n, p in parts.items()}} for k in dict.fromkeys(shown)]
    largest = {n: name(int(p.argmax())) for n, p in parts.items()}
    said = ", ".join(f"{part}: {of!r}" for part, of in largest.items())
    return Table(rows, f"{'centred ' if centred else ''}scores in parts; largest of each part alone: {said}")


def _names(scope: LinearScope):
    if scope.batch.ids is not None and scope.model.tokenizer is not None:
        return "token", lambda k: scope.model.tokenizer.decode([k])
    labels = scope.model.labels
    return ("class", lambda k: labels[k]) if labels else ("output", str)
