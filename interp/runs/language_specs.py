"""Parts that specifications of language models share: observables, texts, sites and counts."""

from typing import Any

from pydantic import model_validator

from interp.hooks.attach import load
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.observables.observable import Observable
from interp.runs.run import Progress
from interp.runs.specs import Fields

Token = str | int


class ObservableSpec(Fields):
    """Tokens that count up and, if there are any, tokens that count down; each a text of one token, or an id.

    Attributes:
        target: The token that counts up.
        foil: The token that counts down.
        positive: Several that count up, in place of a target.
        negative: Several that count down.
        weights: One for each of several, positive ones first; ±1 by default.
        mean: Whether each side of several is averaged instead of summed.
        name: In tables and figures.
    """

    target: Token | None = None
    foil: Token | None = None
    positive: tuple[Token, ...] = ()
    negative: tuple[Token, ...] = ()
    weights: tuple[float, ...] | None = None
    mean: bool = False
    name: str | None = None

    @model_validator(mode="after")
    def _is_one_form(self) -> "ObservableSpec":
        if (self.target is None) == (not self.positive):
            raise ValueError("either target (and foil), or positive (and negative)")
        if self.target is not None and (self.negative or self.weights or self.mean):
            raise ValueError("negative, weights and mean belong to positive; target has foil")
        if self.positive and self.foil is not None:
            raise ValueError("foil belongs to target; positive has negative")
        return self

    def made(self, model: Model) -> Observable:
        """The observable.

        Raises:
            TokenError: If a text is not exactly one token.
            ArgumentError: If the observable is zero, or weights do not match.
        """
        if self.target is None:
            options: dict[str, Any] = {"weights": self.weights, "mean": self.mean, "name": self.name}
            return Observable.tokens(model, self.positive, self.negative, **options)
        if self.foil is None:
            return Observable.logit(model, self.target, name=self.name)
        return Observable.logit_diff(model, self.target, self.foil, name=self.name)


class TextsSpec(Fields):
    """A list of texts, or a template with words for its ``{}``.

    Attributes:
        texts: The texts.
        template: A text with ``{}``.
        words: What is put there, one after the other.
    """

    texts: tuple[str, ...] = ()
    template: str = ""
    words: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        return {"texts": given} if isinstance(given, (list, tuple)) else given

    @model_validator(mode="after")
    def _has_texts(self) -> "TextsSpec":
        if self.template and ("{}" not in self.template or not self.words):
            raise ValueError("a template with {} and words for it")
        if bool(self.texts) == bool(self.template) or (self.words and not self.template):
            raise ValueError("either texts, or a template and its words")
        if not all(self.made()):
            raise ValueError("texts that are not empty")
        return self

    def made(self) -> list[str]:
        """The texts."""
        return list(self.texts) or [self.template.replace("{}", word) for word in self.words]


def language_model(name: str, progress: Progress) -> Model:
    """Load a language model with a tokenizer.

    Raises:
        InterpError: If there is no such model, or it has no tokenizer.
    """
    progress(f"loading {name}")
    model = load(name)
    if model.tokenizer is None or model.layout is None:
        raise ArgumentError(f"model {name!r} ({model.family})", "a language model with a tokenizer")
    return model
