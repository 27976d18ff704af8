"""What a model says next: its most likely tokens behind one position of a prompt."""

from typing import Any

import torch

from interp.hooks.errors import ArgumentError
from interp.hooks.interventions import PlanLike
from interp.hooks.model import Model
from interp.hooks.table import Table


@torch.no_grad()
def next_tokens(model: Model, prompt: Any, k: int = 10, *, position: int = -1, plan: PlanLike = ()) -> Table:
    """Return the k most likely next tokens: token, id, logit, and probability softmax(logits)_token.

    Args:
        model: A decoder with a tokenizer.
        prompt: One text, or token ids.
        k: How many.
        position: Behind which token; the last by default.
        plan: Interventions under which the model runs.

    Raises:
        ArgumentError: If there is more than one prompt, no tokenizer, or k is out of range.
        PositionError: If the position lies outside the prompt.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> interp.next_tokens(model, "The Eiffel Tower is in the city of", k=1)[0]["token"]
        ' Paris'
    """
    batch = model.batch(prompt)
    if batch.size != 1 or model.tokenizer is None:
        raise ArgumentError(f"{batch.size} prompts for a {model.family} model", "one prompt and a tokenizer")
    logits = model.run(batch, plan=plan)[0, int(batch.positions(position)[0, 0])].float()
    if not 1 <= k <= len(logits):
        raise ArgumentError(f"k={k}", f"1..{len(logits)}")
    probabilities, ids = torch.softmax(logits, -1).topk(k)
    rows = [
        {"token": model.tokenizer.decode([i]), "id": i, "logit": float(logits[i]), "probability": p}
        for i, p in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]
    return Table(rows, prompt if isinstance(prompt, str) else "")
