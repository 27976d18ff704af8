"""Token tables and chat templates."""

from typing import TYPE_CHECKING

from interp.hooks.errors import InputError
from interp.hooks.table import Table

if TYPE_CHECKING:
    from interp.hooks.model import Model


def token_table(model: "Model", text, chat: bool = False) -> Table:
    """Return rows (position, id, token) of a text or a chat, as the model would read it.

    Raises:
        InputError: If there is no tokenizer, the text is empty, or there is no chat template.
    """
    ids = chat_ids(model, text) if chat else model.batch(text).ids[0].tolist()  # type: ignore[index]
    rows = [{"position": i, "id": int(t), "token": model.tokenizer.decode([t])} for i, t in enumerate(ids)]
    return Table(rows, f"{len(rows)} tokens")


def chat_ids(model: "Model", messages) -> list[int]:
    """Return token ids of a chat, ready for the model's answer.

    Args:
        model: A model with a tokenizer that has a chat template.
        messages: A user's message, or a list of {"role": ..., "content": ...}.

    Raises:
        InputError: If there is no tokenizer or no chat template.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise InputError("chat=True", "a tokenizer with a chat template", "write the turns into the text yourself")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
