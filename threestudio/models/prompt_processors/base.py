"""View-dependent prompts and their text embeddings, with the interface of threestudio 0.2.3."""

import json
import os
from dataclasses import dataclass, field
from typing import Annotated

import torch

import threestudio
from threestudio.models.prompt_processors.cache import EmbeddingCache, hash_prompt
from threestudio.utils.base import BaseObject
from threestudio.utils.errors import UserError
from threestudio.utils.misc import cleanup
from threestudio.utils.typing import *

__all__ = [
    "DirectionConfig",
    "PromptProcessor",
    "PromptProcessorOutput",
    "hash_prompt",
    "shift_azimuth_deg",
]

CACHE_DIR = os.path.join(".threestudio_cache", "text_embeddings")
PROMPT_LIBRARY = os.path.join("load", "prompt_library.json")


def shift_azimuth_deg(azimuth: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same angle in [-180, 180)."""
    return (azimuth + 180) % 360 - 180


@dataclass
class DirectionConfig:
    """A viewing direction: how it changes the two prompts, and which cameras it applies to
    (``condition(elevation, azimuth, distance) -> bool``, tensors (B,), azimuth in degrees and
    already within [-180, 180))."""

    name: str
    prompt: Callable[[str], str]
    negative_prompt: Callable[[str], str]
    condition: Callable[
        [Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"]], Bool[Tensor, "B"]
    ]


@dataclass
class PromptProcessorOutput:
    """Embeddings of one prompt; T tokens of width D, and V directions (``directions``).

    The conditional half always comes FIRST, the unconditional (negative prompt) second: the
    opposite of diffusers' order.
    """

    text_embeddings: Float[Tensor, "1 T D"]
    uncond_text_embeddings: Float[Tensor, "1 T D"]
    text_embeddings_vd: Float[Tensor, "V T D"]
    uncond_text_embeddings_vd: Float[Tensor, "V T D"]
    directions: List[DirectionConfig]
    direction2idx: Dict[str, int]
    use_perp_neg: bool
    perp_neg_f_sb: Tuple[float, float, float]
    perp_neg_f_fsb: Tuple[float, float, float]
    perp_neg_f_fs: Tuple[float, float, float]
    perp_neg_f_sf: Tuple[float, float, float]
    prompt: str = ""
    prompts_vd: List[str] = field(default_factory=list)

    def direction_indices(
        self,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
    ) -> Int[Tensor, "B"]:
        """Index into ``directions`` for each camera (degrees); of several that apply, the last."""
        azimuth = shift_azimuth_deg(azimuth)
        index = torch.zeros_like(elevation, dtype=torch.long)
        for d in self.directions:
            # no index[...] = ..., for which the CPU would have to wait for the GPU
            applies = d.condition(elevation, azimuth, camera_distances)
            index = torch.where(applies, self.direction2idx[d.name], index)
        return index.to(self.text_embeddings.device)

    def get_text_embeddings(
        self,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        view_dependent_prompting: bool = True,
    ) -> Float[Tensor, "2B T D"]:
        """B conditional rows, then B unconditional rows; angles in degrees."""
        n = elevation.shape[0]
        if view_dependent_prompting:
            index = self.direction_indices(elevation, azimuth, camera_distances)
            halves = [self.text_embeddings_vd[index], self.uncond_text_embeddings_vd[index]]
        else:
            halves = [
                self.text_embeddings.expand(n, -1, -1),
                self.uncond_text_embeddings.expand(n, -1, -1),
            ]
        return torch.cat(halves)

    def get_text_embeddings_perp_neg(
        self,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        view_dependent_prompting: bool = True,
    ) -> Tuple[Float[Tensor, "4B T D"], Float[Tensor, "B 2"]]:
        """Embeddings and weights of the negatives for Perp-Neg (arXiv:2304.04968).

        Rows: B positives, B unconditional, 2B negatives (two consecutive ones per camera). With
        f(r) = a exp(-b r) + c for a triple (a, b, c), and az the azimuth in [-180, 180):

        - overhead: the overhead view, both weights zero;
        - |az| < 90, r = 1 - |az|/90: positive r front + (1 - r) side; negatives front and side
          with weights -f_fs(r) and -f_sf(1 - r);
        - else, r = 2 - |az|/90: positive r side + (1 - r) back; negatives side and front with
          weights -f_sb(r) and -f_fsb(r).
        """
        if not view_dependent_prompting:
            raise UserError("Perp-Neg needs view_dependent_prompting=true")
        index = self.direction_indices(elevation, azimuth, camera_distances)
        side, front, back, overhead = (
            self.text_embeddings_vd[self.direction2idx[name]]
            for name in ("side", "front", "back", "overhead")
        )
        turn = (shift_azimuth_deg(azimuth).abs() / 90).to(side)
        near_front = (turn < 1)[:, None, None]
        above = index == self.direction2idx["overhead"]
        r = torch.where(turn < 1, 1 - turn, 2 - turn)
        mix = r[:, None, None]

        positive = torch.where(
            near_front, mix * front + (1 - mix) * side, mix * side + (1 - mix) * back
        )
        positive = torch.where(above[:, None, None], overhead, positive)
        uncond = self.uncond_text_embeddings_vd[index]
        negatives = torch.stack(
            [torch.where(near_front, front, side), torch.where(near_front, side, front)], dim=1
        )
        negatives = torch.where(above[:, None, None, None], uncond[:, None], negatives)

        def f(abc: Tuple[float, float, float], x: Tensor) -> Tensor:
            a, b, c = abc
            return a * torch.exp(-b * x) + c

        weights = torch.where(
            (turn < 1)[:, None],
            torch.stack([-f(self.perp_neg_f_fs, r), -f(self.perp_neg_f_sf, 1 - r)], dim=1),
            torch.stack([-f(self.perp_neg_f_sb, r), -f(self.perp_neg_f_fsb, r)], dim=1),
        )
        weights = weights * (~above)[:, None]
        return torch.cat([positive, uncond, negatives.flatten(0, 1)]), weights


class PromptProcessor(BaseObject):
    """``processor() -> PromptProcessorOutput``; the work is done once, at construction.

    Subclasses define ``fingerprint() -> str | None`` (identifies the text model's weights; None
    while they are not on this machine) and ``encode(texts) -> (embeddings (N, T, D), token
    counts)``, which loads the model, encodes all texts in one call and frees the model again.
    """

    @dataclass
    class Config(BaseObject.Config):
        prompt: str = "a hamburger"  # or "lib:word_word": the library's prompt with these words
        # replace the whole text of a view; an empty string counts as unset
        prompt_front: Optional[str] = None
        prompt_side: Optional[str] = None
        prompt_back: Optional[str] = None
        prompt_overhead: Optional[str] = None
        negative_prompt: str = ""
        pretrained_model_name_or_path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        # degrees of elevation, and of azimuth on either side of 0 and of 180
        overhead_threshold: Annotated[float, "[-360, 360]"] = 60.0
        front_threshold: Annotated[float, "[-360, 360]"] = 45.0
        back_threshold: Annotated[float, "[-360, 360]"] = 45.0
        view_dependent_prompt_front: bool = False  # "side view of X" instead of "X, side view"
        use_cache: bool = True  # keep embeddings in .threestudio_cache/text_embeddings
        # Accepted for threestudio's configurations. There, true encodes in a child process so
        # that its memory is given back; here the encoder is freed in this process either way.
        spawn: bool = True
        use_perp_neg: bool = False
        # (a, b, c) of a exp(-b r) + c; see get_text_embeddings_perp_neg
        perp_neg_f_sb: Annotated[Tuple[float, float, float], "[-1e6, 1e6]"] = (1, 0.5, -0.606)
        perp_neg_f_fsb: Annotated[Tuple[float, float, float], "[-1e6, 1e6]"] = (1, 0.5, +0.967)
        perp_neg_f_fs: Annotated[Tuple[float, float, float], "[-1e6, 1e6]"] = (4, 0.5, -2.426)
        perp_neg_f_sf: Annotated[Tuple[float, float, float], "[-1e6, 1e6]"] = (4, 0.5, -2.426)
        use_prompt_debiasing: bool = False  # not available: refused when switched on
        pretrained_model_name_or_path_prompt_debiasing: str = "bert-base-uncased"
        prompt_debiasing_mask_ids: Annotated[Optional[List[int]], "[0, 1e6]"] = None

    cfg: Config

    def fingerprint(self) -> Optional[str]:
        raise NotImplementedError(f"{type(self).__name__} does not define fingerprint")

    def encode(self, texts: List[str]) -> Tuple[Float[Tensor, "N T D"], List[int]]:
        raise NotImplementedError(f"{type(self).__name__} does not define encode")

    def embedding_shape(self) -> Tuple[Optional[int], Optional[int]]:
        """What is known of (T, D) without loading the model, for what the cache holds."""
        return None, None

    def configure(self) -> None:
        self._cache_dir = CACHE_DIR
        self.directions = self._make_directions()
        self.direction2idx = {d.name: i for i, d in enumerate(self.directions)}
        if self.cfg.use_prompt_debiasing:
            raise UserError(
                "use_prompt_debiasing is not available here: set it to false and write "
                "prompt_side, prompt_back and prompt_overhead by hand"
            )
        self.prompt = self.preprocess_prompt(self.cfg.prompt)
        self.negative_prompt = self.cfg.negative_prompt
        self.prompts_vd = [
            self.cfg.get(f"prompt_{d.name}", None) or d.prompt(self.prompt) for d in self.directions
        ]
        self.negative_prompts_vd = [
            d.negative_prompt(self.negative_prompt) for d in self.directions
        ]
        threestudio.info(
            f"Prompt [{self.prompt}], negative prompt [{self.negative_prompt}], views "
            + " ".join(f"{d.name}:[{p}]" for d, p in zip(self.directions, self.prompts_vd))
        )
        self.prepare_text_embeddings()

    def _make_directions(self) -> List[DirectionConfig]:
        cfg = self.cfg
        conditions = {
            "side": lambda ele, azi, dis: torch.ones_like(ele, dtype=torch.bool),
            "front": lambda ele, azi, dis: azi.abs() < cfg.front_threshold,
            "back": lambda ele, azi, dis: (
                (azi > 180 - cfg.back_threshold) | (azi < -180 + cfg.back_threshold)
            ),
            "overhead": lambda ele, azi, dis: ele > cfg.overhead_threshold,
        }

        def words(name: str) -> Callable[[str], str]:
            if cfg.view_dependent_prompt_front:
                prefix = "backside" if name == "back" else name
                return lambda text: f"{prefix} view of {text}"
            return lambda text: f"{text}, {name} view"

        return [
            DirectionConfig(name, words(name), lambda text: text, condition)
            for name, condition in conditions.items()
        ]

    def preprocess_prompt(self, prompt: str) -> str:
        """The prompt itself, or for ``lib:word_word`` the one prompt of the library
        (``load/prompt_library.json``, key "dreamfusion") that contains all the words."""
        if not prompt.strip():
            raise UserError(
                "the prompt is empty: set system.prompt_processor.prompt, "
                "for example 'a DSLR image of a hamburger'"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"the prompt {prompt!r} is not text in UTF-8: write it anew") from None
        if not prompt.startswith("lib:"):
            return prompt
        words = prompt[len("lib:") :].lower().split("_")
        try:
            with open(PROMPT_LIBRARY, encoding="utf-8") as file:
                library = json.load(file)["dreamfusion"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"prompt {prompt!r} needs the file {PROMPT_LIBRARY} in the current folder, with a "
                f'list of prompts under "dreamfusion" ({error}); or write the prompt in full'
            ) from None
        found = [text for text in library if all(word in text.lower() for word in words)]
        if len(found) != 1:
            shown = "".join(f"; {text!r}" for text in found[:5])
            raise UserError(
                f"{len(found)} prompts of {PROMPT_LIBRARY} contain the words of {prompt!r}, not one"
                + shown
            )
        return found[0]

    @torch.no_grad()
    def prepare_text_embeddings(self) -> None:
        """Read embeddings from the cache and encode all that are missing in one call."""
        texts = [self.prompt, self.negative_prompt, *self.prompts_vd, *self.negative_prompts_vd]
        texts = list(dict.fromkeys(texts))
        model = self.fingerprint() if self.cfg.use_cache else None
        cache = EmbeddingCache(self._cache_dir)
        known = {}
        if model is not None:
            shape = self.embedding_shape()
            known = {t: e for t in texts if (e := cache.load(model, t, shape)) is not None}
            if len({e.shape for e, _ in known.values()}) > 1:
                threestudio.warn(
                    "Recomputing the text embeddings: those that are kept differ in shape"
                )
                known = {}
        missing = [t for t in texts if t not in known]
        if missing:
            embeddings, counts = self.encode(missing)
            if any(e.shape != embeddings[0].shape for e, _ in known.values()):
                threestudio.warn("Recomputing the text embeddings: those kept are of another shape")
                known, missing = {}, texts
                embeddings, counts = self.encode(missing)
            cleanup()
            known.update(zip(missing, zip(embeddings, counts)))
            if self.cfg.use_cache and (model := self.fingerprint()) is not None:
                try:
                    for text in missing:
                        cache.save(model, text, *known[text])
                except OSError as error:  # the run does not need the cache
                    threestudio.warn(f"text embeddings are not kept: {error}")
        embeddings = {t: e.to(self.device, torch.float32) for t, (e, _) in known.items()}
        self._warn_if_truncated({t: count for t, (_, count) in known.items()}, known)

        def stack(wanted: List[str]) -> Float[Tensor, "N T D"]:
            return torch.stack([embeddings[t] for t in wanted])

        self.text_embeddings = stack([self.prompt])
        self.uncond_text_embeddings = stack([self.negative_prompt])
        self.text_embeddings_vd = stack(self.prompts_vd)
        self.uncond_text_embeddings_vd = stack(self.negative_prompts_vd)

    def _warn_if_truncated(self, counts: Dict[str, int], known: Dict[str, Any]) -> None:
        limit = known[self.prompt][0].shape[0]
        longest = max(counts, key=counts.get)
        if counts[longest] <= limit:
            return
        hint = ""
        if not self.cfg.view_dependent_prompt_front and longest in self.prompts_vd:
            hint = (
                "; words about the view stand at the end and may be lost, too. Shorten the prompt, "
                "or set system.prompt_processor.view_dependent_prompt_front=true"
            )
        threestudio.warn(
            f"The text model reads at most {limit} tokens, and the prompt has {counts[longest]} (a "
            f"rare word is several): its end is dropped{hint}"
        )

    def __call__(self) -> PromptProcessorOutput:
        return PromptProcessorOutput(
            text_embeddings=self.text_embeddings,
            uncond_text_embeddings=self.uncond_text_embeddings,
            text_embeddings_vd=self.text_embeddings_vd,
            uncond_text_embeddings_vd=self.uncond_text_embeddings_vd,
            directions=self.directions,
            direction2idx=self.direction2idx,
            use_perp_neg=self.cfg.use_perp_neg,
            perp_neg_f_sb=self.cfg.perp_neg_f_sb,
            perp_neg_f_fsb=self.cfg.perp_neg_f_fsb,
            perp_neg_f_fs=self.cfg.perp_neg_f_fs,
            perp_neg_f_sf=self.cfg.perp_neg_f_sf,
            prompt=self.prompt,
            prompts_vd=self.prompts_vd,
        )
