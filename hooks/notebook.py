"""What results look like in a notebook beyond tables: tokens with colours, small pictures of maps. Plain HTML."""

import base64
import html
import io
import unicodedata
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}
_FOR, _AGAINST = (47, 120, 179), (197, 105, 13)  # blue and orange: told apart with every common colour blindness
_SIDE = 96
_MOST_CELLS = 256


def visible(token: str, width: int | None = None) -> str:
    r"""Return a token's text as one legible line: outer spaces as ␣, line ends and control characters as escapes.

    Args:
        token: The token's text.
        width: Cut to this many characters, the last then an ellipsis.

    Example:
        >>> visible(" Mary"), visible("\n\n"), visible("")
        ('␣Mary', '\\n\\n', '∅')
    """
    inner = token.strip(" ")
    left = len(token) - len(token.lstrip(" ")) if inner else len(token)
    right = len(token) - len(token.rstrip(" ")) if inner else 0
    text = "␣" * left + "".join(map(_character, inner)) + "␣" * right or "∅"
    return text if width is None or len(text) <= width else text[: max(width - 1, 1)] + "…"


def _character(c: str) -> str:
    """One character, escaped where it would not be seen or would reorder others (controls, marks of direction)."""
    if c in _ESCAPES:
        return _ESCAPES[c]
    if c != " " and unicodedata.category(c)[0] in "CZ":
        return f"\\u{ord(c):04x}"
    return c


def coloured_tokens(tokens: Sequence[str], values: Float[Tensor, "pos"], caption: str = "") -> str:
    """Tokens on blue (positive) or orange (negative), as strong as their value beside the largest one.

    Args:
        tokens: Raw texts; they are escaped.
        values: One for each token; each stands in its token's title.
        caption: A line in front.

    Example:
        >>> coloured_tokens(["<b>"], torch.tensor([-2.0]))
        '<div><span title="-2" style="background:rgba(197,105,13,0.80)">&lt;b&gt;</span></div>'
    """
    largest = max(float(values.abs().max()) if len(values) else 0.0, 1e-30)
    spans = [
        f'<span title="{value:.4g}" style="background:rgba({",".join(map(str, _FOR if value >= 0 else _AGAINST))},'
        f'{0.8 * abs(value) / largest:.2f})">{html.escape(visible(token))}</span>'
        for token, value in zip(tokens, values.tolist(), strict=True)
    ]
    head = f"<div>{html.escape(caption)}</div>" if caption else ""
    return f"{head}<div>{' '.join(spans)}</div>"


def small_maps(maps: Float[Tensor, "map height width"], names: Sequence[str]) -> str:
    """Maps of values from 0 to 1 as small pictures in a row, white to blue, each with its name.

    Square roots are drawn, so that small values are seen. Maps of more than 256 cells a side are pooled by their
    maxima.
    """
    return "".join(
        f'<figure style="display:inline-block;margin:2px;text-align:center"><img width="{_SIDE}" height="{_SIDE}" '
        f'style="image-rendering:pixelated;border:1px solid #dfe3e8" alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{_picture(one)}"><figcaption>{html.escape(name)}</figcaption></figure>'
        for one, name in zip(maps, names, strict=True)
    )


def _picture(values: Float[Tensor, "height width"]) -> str:
    from PIL import Image

    step = max(1, -(-max(values.shape) // _MOST_CELLS))
    small = torch.nn.functional.max_pool2d(values.detach().float().cpu()[None], step, ceil_mode=True)[0]
    strength = small.clamp(0, 1).sqrt()[..., None]
    pixels = (255 + strength * (torch.tensor(_FOR) - 255)).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
