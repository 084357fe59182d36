"""A prompt, its null prompt and its views, embedded by a model's own text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from lods import log
from lods.cameras import Cameras, refuse_contradictions, view_words
from lods.methods.conditions import Conditions
from lods.models.base import Model
from lods.models.cards import local_folder
from lods.models.vocabulary import Vocabulary
from lods.preflight import NO_SOURCE_PROMPT
from torch import Tensor

VIEWS = ("side", "front", "back", "overhead")
# the words of the published codes: of SDS-Bridge, arXiv:2406.09417, and NFSD, arXiv:2310.17590
RENDERS = (
    ", oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, "
    "malformed"
)
BAD_PICTURES = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
    "low-resolution, gloomy"
)


@dataclass
class TextSettings:
    """Which texts stand beside the prompt."""

    # "X, front view" by camera; false: the plain prompt; null: true, unless the model is told the
    # camera by tokens alone
    view_dependent_prompting: bool | None = None
    # degrees of elevation, and of azimuth on either side of 0 and of 180
    overhead_threshold: Annotated[float, "[-360, 360]"] = 60.0
    front_threshold: Annotated[float, "[-360, 360]"] = 45.0
    back_threshold: Annotated[float, "[-360, 360]"] = 45.0
    # what the renders look like: a text of its own, or (null) the prompt with source_suffix; the
    # methods that edit need one
    source_prompt: str | None = None
    source_suffix: str = RENDERS
    bad_prompt: str = BAD_PICTURES  # a text of bad pictures
    # of a model that lists the words that it knows: take a prompt without any of its objects
    allow_unknown_words: bool = False


def check_words(
    name: str, prompt: str, settings: TextSettings, force: str = "allow_unknown_words=True"
) -> None:
    """Raise ``ValueError``, one line, for a prompt in which the model of this name knows no object,
    and warn of words that it lacks, where its folder lists its words. ``force``: how to have such
    a prompt taken."""
    folder = local_folder(name)
    vocabulary = Vocabulary.read(folder) if folder else None
    if vocabulary is None:
        return
    refusal = vocabulary.refusal(prompt, force)
    if refusal and not settings.allow_unknown_words:
        raise ValueError(refusal)
    if warning := vocabulary.warning([prompt], prompt):
        log.warn(warning)


class EmbeddedPrompts:
    """The texts of a run (:class:`lods.methods.conditions.Prompts`), embedded when they are first
    wanted. Raises ``ValueError``, one line, for words for the view where the model is told the
    camera by tokens alone, and for none where it is told both."""

    def __init__(self, model: Model, prompt: str, negative_prompt: str, settings: TextSettings):
        self.model, self.settings = model, settings
        told, asked = getattr(model, "cameras", "words"), settings.view_dependent_prompting
        refuse_contradictions(told, asked)
        self.view_words = view_words(told, asked)
        source = settings.source_prompt
        self._texts = {
            "prompt": prompt,
            "null": negative_prompt,
            "source": prompt + settings.source_suffix if source is None else source,
            **({} if source is None else {"edited": source}),
            "bad": settings.bad_prompt,
        }
        self._embedded: dict[str, Float[Tensor, "T D"]] = {}

    def _embed(self, texts: Sequence[str]) -> Float[Tensor, "N T D"]:
        new = [text for text in dict.fromkeys(texts) if text not in self._embedded]
        if new:
            if not self._embedded:  # all that every method wants, in one call
                every = (self._texts["prompt"], self._texts["null"])
                new = [*every, *self._views("prompt"), *self._views("null"), *new]
                new = list(dict.fromkeys(new))
            self._embedded |= dict(zip(new, self.model.text(new)))
        return torch.stack([self._embedded[text] for text in texts])

    def plain(self, text: str) -> Float[Tensor, "T D"]:
        """See :class:`lods.methods.conditions.Prompts`."""
        if text == "edited" and text not in self._texts:
            raise ValueError(NO_SOURCE_PROMPT)
        return self._embed([self._texts[text]])[0]

    def _views(self, text: str) -> list[str]:
        """The texts for VIEWS; the null prompt and a text of bad pictures are one for all."""
        plain = self._texts[text]
        own = text == "source" and self.settings.source_prompt is not None
        if text in ("null", "bad") or not (self.view_words and plain):
            return [plain] * len(VIEWS)
        if text == "source" and not own:
            prompt, suffix = self._texts["prompt"], self.settings.source_suffix
            return [f"{prompt}, {view} view{suffix}" for view in VIEWS]
        return [f"{plain}, {view} view" for view in VIEWS]

    def conditions(self, cameras: Cameras, others: Sequence[str] = ()) -> Conditions:
        """See :class:`lods.methods.conditions.Prompts`."""
        index = view_index(cameras, self.settings)
        rows = {
            text: self._embed(self._views(text)).to(self.model.device)[index]
            for text in ("prompt", "null", *others)
        }
        return Conditions(rows.pop("prompt"), rows.pop("null"), others=rows, cameras=cameras)


def view_index(cameras: Cameras, settings: TextSettings) -> Int[Tensor, " B"]:
    """The place in VIEWS of what each camera sees: the last of those that apply."""
    elevation, azimuth, _ = cameras.views
    azimuth = (azimuth + 180) % 360 - 180
    applies = (
        azimuth.abs() < settings.front_threshold,
        azimuth.abs() > 180 - settings.back_threshold,
        elevation > settings.overhead_threshold,
    )
    index = torch.zeros_like(elevation, dtype=torch.long)
    for place, here in enumerate(applies, 1):
        index = torch.where(here, place, index)
    return index
