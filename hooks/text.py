"""Token tables and chat templates."""

import operator
import warnings
from typing import TYPE_CHECKING, SupportsIndex

from interp.hooks.errors import InputError, TokenError
from interp.hooks.table import Table

if TYPE_CHECKING:
    from interp.hooks.model import Model


def token_table(model: "Model", text, chat: bool = False) -> Table:
    """Return rows (position, id, token) of a text or a chat, as the model would read it.

    Raises:
        InputError: If there is no tokenizer, the text is empty, or there is no chat template.
    """
    if chat:
        ids = chat_ids(model, text)
    else:
        batch = model.batch(text)
        if batch.size != 1 or batch.ids is None:
            raise InputError(f"{batch.size} texts", "one text", "make a table for each")
        ids = batch.ids[0].tolist()
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


def token_ids(model: "Model", token: str | SupportsIndex) -> list[int]:
    """Return the ids that a string encodes to without special tokens; an id stands for itself.

    ``" she"`` and ``"she"`` are different tokens; a warning says so where a string without a leading space is one token
    and the one with a space is another.

    Raises:
        TokenError: If the string is empty or encodes to nothing, or the id is outside the vocabulary.
    """
    vocab = model.reader.vocab
    if not isinstance(token, (str, bool)) and hasattr(token, "__index__"):
        token = operator.index(token)
    if isinstance(token, int) and not isinstance(token, bool):
        if token < 0 or (vocab is not None and token >= vocab):
            raise TokenError(f"token id {token}", f"an id in 0..{(vocab or 0) - 1}")
        return [token]
    if not isinstance(token, str) or not token:
        raise TokenError(f"token {token!r}", "an id or a non-empty string")
    if model.tokenizer is None:
        raise TokenError(f"token {token!r}", "a tokenizer", "give the token's id")
    ids = [int(i) for i in model.tokenizer.encode(token, add_special_tokens=False)]
    if not ids:
        raise TokenError(f"token {token!r} encodes to no ids", "at least one", "give an id or another word")
    if len(ids) == 1 and (spaced := _spaced(model, token)) not in (None, ids[0]):
        warnings.warn(
            f"{token!r} is id {ids[0]}; {' ' + token!r} (with a leading space) is another token, {spaced}. "
            "Mid-sentence words usually need the space.",
            stacklevel=4,
        )
    return ids


def token_id(model: "Model", token: str | SupportsIndex) -> int:
    """Return the id of a token, given as an id or as a string that encodes to exactly one (see `token_ids`).

    Raises:
        TokenError: If the string encodes to several ids or none, or the id is outside the vocabulary.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> token_id(model, " Mary")
        5099
    """
    ids = token_ids(model, token)
    if len(ids) != 1:
        raise several_ids(model, str(token), ids, "exactly one", "give an id or another word")
    return ids[0]


def several_ids(model: "Model", token: str, ids: list[int], needed: str, do: str) -> TokenError:
    """Return the error for a string of several ids; where the string with a leading space is one, it says so."""
    spaced = _spaced(model, token)
    hint = "" if spaced is None else f"{' ' + token!r} (with a leading space) is one, {spaced}; or "
    return TokenError(f"token {token!r} encodes to {len(ids)} ids {ids}", needed, hint + do)


def _spaced(model: "Model", token: str) -> int | None:
    """The id of the string with a leading space, where it is exactly one."""
    if token.startswith(" "):
        return None
    ids = model.tokenizer.encode(f" {token}", add_special_tokens=False)
    return int(ids[0]) if len(ids) == 1 else None
