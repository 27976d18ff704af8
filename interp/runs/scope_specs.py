"""What a run of LinearScope computes: a network, its inputs, what is held, targets, figures."""

import functools
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from interp.hooks.attach import load
from interp.hooks.errors import ArgumentError
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model, main_tensor
from interp.hooks.pictures import inside
from interp.hooks.targets import Targets
from interp.hooks.windows import Window
from interp.runs.run import Progress
from interp.runs.specs import Fields, Spec, Work

Box = tuple[int, int, int, int]
Pixel = tuple[int, int]
FIGURES = ("parts", "outputs", "classes", "votes", "bias", "bias_maps", "impulse", "receptive", "strip")
_ORIGINS = ("zero", "mean", "black", "grey")


class FigureSpec(Fields):
    """One figure, by its name or with its options.

    Attributes:
        figure: ``parts`` (x, y, F x, r), ``outputs`` (F x against r over classes or tokens), ``classes`` (votes and
            rows of several classes), ``votes``, ``bias`` and ``bias_maps`` (of each target), ``impulse``,
            ``receptive``, ``strip``.
        at: Pixel of ``impulse`` (input) and ``receptive`` (output).
        along: Input pixels of ``strip``.
        radius: Around a pixel.
        top: How many classes or tokens; 0 for the figure's own number.
        count: How many maps.
    """

    figure: Literal[FIGURES]  # pyright: ignore[reportInvalidTypeForm]
    at: Pixel | None = None
    along: tuple[Pixel, ...] = ()
    radius: int = Field(default=8, ge=1)
    top: int = Field(default=0, ge=0)
    count: int = Field(default=8, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"figure": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _has_its_place(self) -> "FigureSpec":
        if self.figure in ("impulse", "receptive") and self.at is None:
            raise ValueError(f"figure {self.figure!r} needs at: [row, column]")
        if self.figure == "strip" and not self.along:
            raise ValueError("figure 'strip' needs along: [[row, column], ...]")
        return self


class InputSpec(Fields):
    """One input: a text, or a picture (a file, sample:china.jpg or sample:flower.jpg), cropped and resized first.

    Attributes:
        text: The text.
        image: The picture.
        crop: Top, left, bottom, right.
        resize: Height, width.
        figures: For this input, in place of the specification's.
    """

    text: str | None = Field(default=None, min_length=1)
    image: str | None = Field(default=None, min_length=1)
    crop: Box | None = None
    resize: Pixel | None = None
    figures: tuple[FigureSpec, ...] | None = None

    @model_validator(mode="after")
    def _is_one_thing(self) -> "InputSpec":
        if (self.text is None) == (self.image is None):
            raise ValueError("an input is either text or image")
        if self.text is not None and (self.crop or self.resize):
            raise ValueError("crop and resize belong to an image")
        return self


class LinearizationSpec(Fields):
    """A preset by its name, or with fields and overrides of its own."""

    preset: str = "frozen"
    activation: str | None = None
    norm: str | None = None
    attention: str | None = None
    product: str | None = None
    overrides: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"preset": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _is_legal(self) -> "LinearizationSpec":
        self.made()
        return self

    def made(self) -> Linearization:
        """The linearization."""
        preset = Linearization.of(self.preset).to_dict()
        own = {k: v for k, v in self.model_dump().items() if k in preset and v is not None}
        return Linearization(**{**preset, **own})


class TargetSpec(Fields):
    """A token or class (its text or index), an output index, or a margin between two."""

    target: str | int | tuple[int, ...]
    margin_to: str | int | tuple[int, ...] | None = None
    position: int = -1
    centred: bool = False


class SVDSpec(Fields):
    """Singular triplets, perhaps between windows (top, left, bottom, right) of output and input pictures."""

    k: int = Field(default=6, ge=1)
    window: Box | None = None
    input_window: Box | None = None
    centred: bool = False
    pairs: int = Field(default=6, ge=1)
    expected: float | None = None


class BlocksSpec(Fields):
    """Token blocks up to a site (the logits where there is none), estimated from probes or exact (probes: null)."""

    site: str | None = None
    probes: int | None = Field(default=32, ge=2)
    positions: tuple[int, ...] | None = None
    seed: int = 0


class LinearScopeSpec(Spec):
    """A network around each of several inputs as F x + r.

    Attributes:
        model: A packaged name, hub id, folder or GGUF file.
        inputs: Texts or pictures.
        linearization: What is held.
        origin: zero, mean, black, grey, a number, or one for each channel.
        output: A site; the network's own output by default.
        targets: Of votes and bias reports. By default the largest class or token, and its margin to the next.
        figures: What is drawn; by default what suits the network.
        stability: Whether votes say what small noise does to them, for some more time.
        svd: Singular vectors.
        token_blocks: Norms of blocks from each token to each position.
    """

    model: str
    inputs: tuple[InputSpec, ...] = Field(min_length=1)
    linearization: LinearizationSpec = LinearizationSpec()
    origin: str | float | tuple[float, ...] = "zero"
    output: str | None = None
    targets: tuple[TargetSpec, ...] = ()
    figures: tuple[FigureSpec, ...] | None = None
    stability: bool = False
    svd: SVDSpec | None = None
    token_blocks: BlocksSpec | None = None

    @field_validator("origin")
    @classmethod
    def _is_an_origin(cls, given: Any) -> Any:
        if isinstance(given, str) and given not in _ORIGINS:
            raise ValueError(f"one of {', '.join(_ORIGINS)}, a number, or a number for each channel")
        return given

    def prepare(self, progress: Progress) -> Work:
        """Load the network and check every input, target, figure and window against it: one plain run of each input.

        Raises:
            InterpError: If the network or anything that is named of it does not exist.
        """
        from interp.runs.scope_runs import compute

        progress(f"loading {self.model}")
        model = load(self.model)
        inputs = []
        for number, one in enumerate(self.inputs, start=1):
            progress(f"checking input {number}")
            inputs.append(_read(model, one))
            self._check(model, inputs[-1], one)
        return functools.partial(compute, self, model, inputs)

    def figures_of(self, number: int, y: Tensor, tokens: bool) -> tuple[FigureSpec, ...]:
        """What is drawn of an input: its own list, the specification's, or what suits the output."""
        chosen = self.inputs[number].figures if self.inputs[number].figures is not None else self.figures
        return _usual(y, tokens) if chosen is None else chosen

    def origin_for(self, model: Model) -> Any:
        """The origin as `LinearScope` takes it."""
        if isinstance(self.origin, str):
            return self.origin
        values = torch.as_tensor(self.origin, dtype=model.dtype, device=model.device)
        return values.reshape(1, -1, 1, 1) if values.ndim else values

    def _check(self, model: Model, x: Any, one: InputSpec) -> None:
        batch, tokens = model.batch(x), one.text is not None
        with torch.no_grad():
            y = model.capture(x, self.output)[self.output] if self.output else main_tensor(model.forward(batch))
        found = Targets(model, batch, y)
        for target in self.targets:
            found.pair(target.target, target.margin_to, target.position, target.centred)
        for figure in self.figures_of(self.inputs.index(one), y, tokens):
            _check_figure(figure, y, tokens, None if tokens else tuple(batch.args[0].shape[1:]), bool(self.targets))
        if self.svd is not None:
            _check_svd(self.svd, y, batch, tokens)
        if self.token_blocks is not None:
            if not tokens:
                raise ArgumentError("token_blocks of a picture", "a text")
            for site in filter(None, [self.token_blocks.site]):
                model.resolve(site)
            batch.positions(list(self.token_blocks.positions or [0]))


def box(window: Box | None) -> tuple[Any, ...] | None:
    """Top, left, bottom, right as slices into [channel, height, width]."""
    return None if window is None else (..., slice(window[0], window[2]), slice(window[1], window[3]))


def _read(model: Model, one: InputSpec) -> Any:
    if one.text is not None:
        if model.tokenizer is None:
            raise ArgumentError(f"a text for {model.identity.get('name', 'a model')!r}", "a model with a tokenizer")
        return one.text
    if model.preprocess is None:
        raise ArgumentError(f"a picture for {model.identity.get('name', 'a model')!r}", "a model of pictures")
    picture = open_picture(str(one.image))
    if one.crop is not None:
        top, left, bottom, right = one.crop
        if not (0 <= top < bottom <= picture.height and 0 <= left < right <= picture.width):
            raise ArgumentError(f"crop {list(one.crop)}", f"a box inside {picture.height} x {picture.width}")
        picture = picture.crop((left, top, right, bottom))
    if one.resize is not None:
        from PIL import Image

        if min(one.resize) < 1:
            raise ArgumentError(f"resize {list(one.resize)}", "a height and a width above 0")
        picture = picture.resize(one.resize[::-1], Image.Resampling.LANCZOS)
    return model.preprocess(picture)


def open_picture(image: str) -> Any:
    """Return a picture file, or one of scikit-learn's photographs (``sample:china.jpg``), as a PIL image.

    Raises:
        InputError: If there is no such picture.
        ArgumentError: If there is no such sample.
    """
    from interp.hooks.networks.images import open_image

    if not image.startswith("sample:"):
        return open_image(image)
    from sklearn.datasets import load_sample_image

    try:
        return open_image(load_sample_image(image.removeprefix("sample:")))
    except (AttributeError, ValueError) as error:
        raise ArgumentError(f"image {image!r}", "sample:china.jpg, sample:flower.jpg or a file") from error


def _usual(y: Tensor, tokens: bool) -> tuple[FigureSpec, ...]:
    if y.ndim == 4:
        return (FigureSpec(figure="parts"),)
    names = ("outputs", "votes") if tokens else ("outputs", "classes", "votes", "bias", "bias_maps")
    return tuple(FigureSpec(figure=name) for name in names)


def _check_figure(figure: FigureSpec, y: Tensor, tokens: bool, shape: tuple[int, ...] | None, targets: bool) -> None:
    """Refuse a figure that this network does not have, or a pixel outside the picture."""
    pictures, name = y.ndim == 4, figure.figure
    fits = {
        "parts": pictures, "impulse": pictures, "strip": pictures, "receptive": pictures, "outputs": not pictures,
        "classes": y.ndim == 2 and not tokens, "bias_maps": not tokens and (targets or not pictures),
    }  # fmt: skip
    if not fits.get(name, targets or not pictures):
        raise ArgumentError(
            f"figure {name!r} of {'a text' if tokens else 'a picture'} -> {list(y.shape[1:])}",
            f"one of {', '.join(n for n in FIGURES if fits.get(n, targets or not pictures))}",
            "" if targets or not pictures else "votes and bias of a picture's output need targets",
        )
    places = figure.along if name == "strip" else (figure.at,) if name in ("impulse", "receptive") else ()
    for place in places:
        inside(place, tuple(y.shape[1:]) if name == "receptive" else tuple(shape or ()))


def _check_svd(svd: SVDSpec, y: Tensor, batch: Any, tokens: bool) -> None:
    if tokens:
        if svd.window or svd.input_window:
            raise ArgumentError("windows of a text", "a picture")
        return
    sizes = []
    for window, shape, what in (
        (svd.window, y.shape[1:], "outputs"), (svd.input_window, batch.args[0].shape[1:], "inputs")
    ):  # fmt: skip
        sizes.append(len(Window(box(window), tuple(shape), what).index))
    if svd.k >= min(sizes):
        raise ArgumentError(f"svd k={svd.k} of a {sizes[0]} x {sizes[1]} map", f"1..{min(sizes) - 1}")
