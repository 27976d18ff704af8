"""Pictures in and out of image networks."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from interp.hooks.errors import InputError


def open_image(image: Any) -> Any:
    """An RGB `PIL.Image` from a path, a PIL image, or an array.

    A picture's own orientation mark is followed, an alpha channel is dropped, grey becomes RGB.

    Args:
        image: Path, `PIL.Image`, or uint8 array [H, W], [H, W, 3] or [H, W, 4].

    Raises:
        InputError: No file, no picture that can be read, or an array of another kind.
    """
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise InputError(
            f"an image of type {type(image).__name__}",
            "a path, a PIL image or a uint8 array [H, W, 3]",
            "tensors that are prepared already go to the model itself",
        )
    try:
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        given = "a PIL image" if isinstance(image, Image.Image) else f"the file {os.fspath(image)}"
        raise InputError(
            f"{given}: {error}", "a picture that Pillow can read", "check the path and that the file is whole"
        ) from error


def _from_array(array: np.ndarray) -> Any:
    from PIL import Image

    fits = (
        array.dtype == np.uint8 and array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    )
    if not fits:
        raise InputError(
            f"an array {array.dtype} of shape {list(array.shape)}",
            "uint8 values 0..255 of shape [H, W], [H, W, 3] or [H, W, 4]",
            "for values in 0..1 give (255 * x).round().astype('uint8')",
        )
    return Image.fromarray(array).convert("RGB")


@dataclass(frozen=True)
class CropResizeScale:
    """Picture to [1, 3, size, size]: centre crop, bicubic resize, (value - mean) / divisor.

    The crop is a square of size / (size + margin) of the shorter side, as in EfficientNet's evaluation.

    Example:
        >>> CropResizeScale()(np.zeros((300, 400, 3), np.uint8)).shape
        torch.Size([1, 3, 224, 224])
    """

    size: int = 224
    margin: int = 32
    mean: float = 127.0
    divisor: float = 128.0

    def __call__(self, image: Any) -> torch.Tensor:
        """Float32 tensor [1, 3, size, size], RGB.

        Raises:
            InputError: A picture that cannot be read.
        """
        from PIL import Image

        picture = open_image(image)
        width, height = picture.size
        side = max(1, int(self.size / (self.size + self.margin) * min(width, height)))
        left, top = (width - side + 1) // 2, (height - side + 1) // 2
        picture = picture.crop((left, top, left + side, top + side))
        picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return (_to_tensor(picture) - self.mean) / self.divisor

    def undo(self, pixels: torch.Tensor) -> Any:
        """The picture that prepared pixels show, after crop and resize, as a `PIL.Image`."""
        return to_image(pixels * self.divisor + self.mean)


@dataclass(frozen=True)
class RawPixels:
    """Picture to [1, 3, H, W]: its values 0..255 as floats, size unchanged."""

    def __call__(self, image: Any) -> torch.Tensor:
        """Float32 tensor [1, 3, H, W], RGB.

        Raises:
            InputError: A picture that cannot be read.
        """
        return _to_tensor(open_image(image))

    def undo(self, pixels: torch.Tensor) -> Any:
        """The picture that the pixels show, as a `PIL.Image`."""
        return to_image(pixels)


@dataclass(frozen=True)
class ProcessorPixels:
    """Picture to [1, 3, H, W] by a Hugging Face image processor."""

    processor: Any

    def __call__(self, image: Any) -> torch.Tensor:
        """The processor's `pixel_values`.

        Raises:
            InputError: A picture that cannot be read.
        """
        return self.processor(images=open_image(image), return_tensors="pt")["pixel_values"]

    def undo(self, pixels: torch.Tensor) -> Any:
        """The picture that prepared pixels show, as a `PIL.Image`."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(getattr(self.processor, "image_mean", None) or 0.0).reshape(shape)
        std = torch.tensor(getattr(self.processor, "image_std", None) or 1.0).reshape(shape)
        return to_image((pixels.cpu() * std + mean) * 255)


def to_image(pixels: torch.Tensor) -> Any:
    """A `PIL.Image` from [1, 3, H, W] or [3, H, W] in 0..255: clipped and rounded.

    Raises:
        InputError: Another shape.

    Example:
        >>> to_image(torch.full((1, 3, 2, 4), 300.0)).size
        (4, 2)
    """
    from PIL import Image

    values = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
    if values.ndim != 3 or len(values) != 3:
        raise InputError(f"pixels of shape {list(pixels.shape)}", "[1, 3, H, W] or [3, H, W]", "give one picture")
    values = values.detach().float().clamp(0, 255).round().to(device="cpu", dtype=torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


def _to_tensor(picture: Any) -> torch.Tensor:
    """RGB picture to float32 [1, 3, H, W]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[None].contiguous()
