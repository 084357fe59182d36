"""Prompts for the guidances: threestudio's prompt processor, which also takes cards and SDXL."""

import hashlib
import json
import os
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch
from jaxtyping import Float
from lods.models import checkpoint
from lods.models.additions import Additions
from lods.models.cards import Location, first_line, has_renders, missing, resolve
from lods.models.families import text_plan
from lods.models.files import load_complete
from lods.models.ideal import NamedObjects
from lods.models.renders import Renders
from lods.models.text import network_config
from lods.models.vocabulary import Vocabulary
from lods.preflight import NO_SOURCE_PROMPT
from lods.prompts import BAD_PICTURES, RENDERS
from torch import Tensor

import threestudio

StableDiffusionPromptProcessor = threestudio.find("stable-diffusion-prompt-processor")

TEXT_FILES = ("tokenizer*/*", "text_encoder*/*.json", "text_encoder*/model*.safetensors")


@threestudio.register("lods-prompt-processor")
class LODSPromptProcessor(StableDiffusionPromptProcessor):
    """``pretrained_model_name_or_path`` may be a card of ``lods/models/cards.yaml`` too.

    How a text is embedded is its model's family's (:class:`lods.models.text.TextPlan`). For a model
    shaped like SDXL an embedding (T + 1, D) is, for each of the T tokens, the last but one hidden
    states of both text encoders one after the other, and in its last row the second encoder's
    pooled embedding, with zeros after it (see :mod:`lods.models.text_layout`). An empty text is all
    zeros if the model says ``force_zeros_for_empty_prompt``, as in diffusers.

    What it returns has one method more, ``other_text(kind)``: the same for a text that a method
    compares the prompt with, embedded when it is asked for. "source" tells what the renders look
    like now, and has the words for the view as the prompt does; "edited" is the same for methods
    that edit, and needs ``source_prompt``; "nfsd_negative" has no such words. A text is worth
    something in words that the model knows: the embedded model would read the published ones letter
    by letter, and cut them off after 14 tokens, so that pocket.yaml has others.

    A model whose folder has a ``vocabulary.json`` (see :mod:`lods.models.vocabulary`) is not asked
    for what it does not know: a prompt without any of its objects is refused, and other words that
    it lacks are named in one warning, at every start.
    """

    @dataclass
    class Config(StableDiffusionPromptProcessor.Config):
        # lods-bridge-guidance, and lods-embedding-guidance with embedding_start=source: a prompt of
        # its own, "" the empty text; null: the prompt's text for the view, and source_suffix
        source_prompt: str | None = None
        source_suffix: str = RENDERS
        # lods-nfsd-guidance: the same for all views
        nfsd_negative_prompt: str = BAD_PICTURES
        # of a model that lists the words that it knows: take a prompt without any of its objects
        allow_unknown_words: bool = False
        # added to the model: LoRA files (path@scale) and textual inversions (path@word), one text
        # or a list of them; the guidance needs the same values
        model_lora: Annotated[Any, "texts"] = None
        model_embeddings: Annotated[Any, "texts"] = None

    cfg: Config

    def configure(self) -> None:
        self._given = {f.name: getattr(self.cfg, f.name) for f in fields(self.Config)}
        added = self.cfg.model_lora, self.cfg.model_embeddings
        self.additions = Additions.of(*added, "system.prompt_processor.")
        model = self.location = resolve(self.cfg.pretrained_model_name_or_path)
        self.single_file = checkpoint.of_folder(model.path)
        self.vocabulary = Vocabulary.read(model.path)
        self.named_objects: NamedObjects | None = None
        if has_renders(model.path):
            self.named_objects = NamedObjects(Renders.read(model.path).objects)
        self.plan = None if self.named_objects else text_plan(model)
        self.cfg.pretrained_model_name_or_path = _text_model(model)
        if self.plan:
            self.parts = self.plan.parts
        if _in_upstream():  # whose own hook would take an encoder without all of its weights
            self.cfg.spawn = False  # a new process does not know this extension by its name
            self.spawn_func = self.write_embeddings
            if self.additions:  # of which the names of its cached files know nothing
                self.cfg.use_cache = False
        super().configure()

    def __call__(self) -> Any:
        output = super().__call__()
        output.other_text = self.other_text
        output.additions = self.additions
        return output

    def prepare_text_embeddings(self) -> None:
        # before anything is embedded: what the cache holds was embedded by an earlier run, and this
        # one shall be told as well
        self.check_words()
        super().prepare_text_embeddings()

    def check_words(self) -> None:
        """Refuse a prompt in which the model knows no object, and name the words that it lacks."""
        if self.vocabulary is None or not self.prompt.strip():  # which the base class refuses
            return
        refusal = self.vocabulary.refusal(self.prompt)
        if refusal and not self.cfg.allow_unknown_words:
            raise ValueError(refusal)
        texts = [self.prompt, *self.prompts_vd, self.negative_prompt]
        if warning := self.vocabulary.warning(texts, self.prompt):
            threestudio.warn(warning)

    def other_text(self, kind: str) -> Any:
        """What calling this returns, with another text (class docstring) as the prompt."""
        cfg, views = self.cfg, {f"prompt_{d.name}": None for d in self.directions}
        if kind == "edited":
            if cfg.source_prompt is None:
                raise ValueError(f"{NO_SOURCE_PROMPT} (system.prompt_processor.source_prompt)")
            kind = "source"
        if kind == "source" and cfg.source_prompt is None:
            texts = (f"{text}{cfg.source_suffix}" for text in self.prompts_vd)
            changes = {"prompt": self.prompt + cfg.source_suffix, **dict(zip(views, texts))}
        elif kind == "source" and cfg.source_prompt.strip():
            changes = {"prompt": cfg.source_prompt, **views}
        else:  # one text for all views, maybe an empty one, is what a negative prompt is
            text = cfg.nfsd_negative_prompt if kind == "nfsd_negative" else ""
            changes = {"negative_prompt": text}
        if self.vocabulary and (warning := self.vocabulary.warning(filter(None, changes.values()))):
            threestudio.warn(warning)
        # the prompt's own words have been looked at, and this text need not name an object
        silent = type(type(self).__name__, (type(self),), {"check_words": lambda self: None})
        with torch.random.fork_rng(devices=[]):  # an encoder that is made, not cached, may draw
            output = silent({**self._given, **changes})()
        if "prompt" in changes:
            return output
        return replace(
            output,
            text_embeddings=output.uncond_text_embeddings,
            text_embeddings_vd=output.uncond_text_embeddings_vd,
        )

    def fingerprint(self) -> str | None:
        if self.named_objects:
            return None  # faster than any cache
        if self.single_file is not None:
            model = json.dumps(checkpoint.identity(self.single_file.path))
            model = hashlib.sha256(model.encode()).hexdigest()
        else:
            model = super().fingerprint()
        notes = [self.plan.note if self.plan else "", self.additions.note()]
        return "-".join(filter(None, (model, *notes))) if model else model

    def embedding_shape(self) -> tuple[int | None, int | None]:
        return super().embedding_shape() if self.plan and self.plan.plain else (None, None)

    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "N T D"], list[int]]:
        if self.named_objects:
            return self.named_objects(texts), [1] * len(texts)
        assert self.plan is not None  # of every other model
        special = self.additions or self.single_file is not None or _in_upstream()
        if self.plan.plain and not special:
            return super().encode(texts)
        load: Any = self._part
        if self.additions:
            load = self.additions.loader(load, network_config(self.location))
            texts = self.additions.spelt_out(texts)
        return self.plan.encode(texts, load, self.device)

    def _part(self, cls: Any, part: str, **kwargs: Any) -> Any:
        network = issubclass(cls, torch.nn.Module)
        if not (_in_upstream() or (network and self.single_file)):  # the host checks more
            return self.load_part(cls, part, **kwargs)
        path = self.cfg.pretrained_model_name_or_path
        if network:
            return load_complete(cls, path, part, **kwargs)
        return cls.from_pretrained(path, subfolder=part, **kwargs)

    def write_embeddings(self, name_or_path: str, prompts: list[str], folder: str) -> None:
        """Upstream's hook: write each embedding where threestudio 0.2.3 looks for it."""
        embeddings, _ = self.encode(prompts)
        for prompt, embedding in zip(prompts, embeddings):
            name = hashlib.md5(f"{name_or_path}-{prompt}".encode()).hexdigest()
            torch.save(embedding.cpu().clone(), os.path.join(folder, f"{name}.pt"))


def _in_upstream() -> bool:
    """Whether threestudio makes embeddings with the hook ``spawn_func``, as upstream does."""
    return hasattr(StableDiffusionPromptProcessor, "spawn_func")


def _text_model(model: Location) -> str:
    """The folder or id for the base class, which knows of no revision: a card that has one is
    downloaded to a folder first, without the UNet."""
    if model.revision is None or os.path.isdir(model.path):
        return model.path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            model.path, revision=model.revision, allow_patterns=list(TEXT_FILES)
        )
    except Exception as error:  # of many kinds, by library and by version
        what = f"{model.path} at revision {model.revision} is"
        raise ValueError(missing(model.path, what, first_line(error), model.path)) from None
