"""Prompts for the priors: threestudio's prompt processor, which also takes cards and SDXL."""

import hashlib
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import threestudio
from threestudio.utils.typing import *

from .cards import Model, first_line, missing, resolve
from .denoiser import load_model_config

StableDiffusionPromptProcessor = threestudio.find("stable-diffusion-prompt-processor")

PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
TEXT_FILES = ("tokenizer*/*", "text_encoder*/*.json", "text_encoder*/model*.safetensors")


@threestudio.register("lods-prompt-processor")
class LODSPromptProcessor(StableDiffusionPromptProcessor):
    """``pretrained_model_name_or_path`` may be a card of ``models/cards.yaml`` too.

    For a model shaped like SDXL an embedding (T + 1, D) is, for each of the T tokens, the last but
    one hidden states of both text encoders one after the other, and in its last row the second
    encoder's pooled embedding, with zeros after it (see :class:`.denoiser.Denoiser`). An empty
    text is all zeros if the model says ``force_zeros_for_empty_prompt``, as in diffusers.
    """

    @dataclass
    class Config(StableDiffusionPromptProcessor.Config):
        pass

    cfg: Config

    def configure(self) -> None:
        model = resolve(self.cfg.pretrained_model_name_or_path)
        self.two_encoders = _has_two_encoders(model)
        self.cfg.pretrained_model_name_or_path = _text_model(model)
        if self.two_encoders:
            self.parts = PARTS
            self.zero_empty = _zeros_for_empty(model)
            if hasattr(StableDiffusionPromptProcessor, "spawn_func"):  # upstream's hook
                self.cfg.spawn = False  # a new process does not know this extension by its name
                self.spawn_func = self.write_embeddings
        super().configure()

    def fingerprint(self) -> Optional[str]:
        model = super().fingerprint()
        return f"{model}-zero" if model and self.two_encoders and self.zero_empty else model

    def encode(self, texts: List[str]) -> Tuple[Float[Tensor, "N T D"], List[int]]:
        if not self.two_encoders:
            return super().encode(texts)
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        states = []
        for tokens, part, kind in (
            ("tokenizer", "text_encoder", CLIPTextModel),
            ("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
        ):
            tokenizer = self._part(AutoTokenizer, tokens, trust_remote_code=False)
            # one after the other, so that only one of them takes memory
            encoder = self._part(kind, part, use_safetensors=True)
            encoder = encoder.to(self.device, torch.float32).eval()
            limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            counts = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
            ids = tokenizer(
                texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                output = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        rows = torch.cat(states, dim=-1)
        if pooled.ndim != 2 or pooled.shape[-1] > rows.shape[-1]:
            raise ValueError(
                f"the pooled text embedding is {tuple(pooled.shape)}, which does not fit into a "
                f"row of {rows.shape[-1]}: the model's text encoders are not SDXL's"
            )
        row = F.pad(pooled, (0, rows.shape[-1] - pooled.shape[-1]))[:, None]
        embeddings = torch.cat([rows, row], dim=1)
        if self.zero_empty:
            embeddings[[not text for text in texts]] = 0
        return embeddings, [count + 1 for count in counts]  # the pooled row counts as a token

    def _part(self, cls: Any, part: str, **kwargs) -> Any:
        if hasattr(super(), "load_part"):  # the host's, with its checks
            return self.load_part(cls, part, **kwargs)
        return cls.from_pretrained(self.cfg.pretrained_model_name_or_path, subfolder=part, **kwargs)

    def write_embeddings(self, name_or_path: str, prompts: List[str], folder: str) -> None:
        """Upstream's hook: write each embedding where threestudio 0.2.3 looks for it."""
        embeddings, _ = self.encode(prompts)
        for prompt, embedding in zip(prompts, embeddings):
            name = hashlib.md5(f"{name_or_path}-{prompt}".encode()).hexdigest()
            torch.save(embedding.cpu().clone(), os.path.join(folder, f"{name}.pt"))


def _has_two_encoders(model: Model) -> bool:
    try:
        config = load_model_config(model.path, "unet", model.revision)
    except ValueError:  # no UNet: only text parts, or nothing, of which the base class complains
        return False
    return config.get("addition_embed_type") == "text_time"


def _zeros_for_empty(model: Model) -> bool:
    """What ``model_index.json`` says; true, diffusers' default, where it says nothing."""
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(model.path, revision=model.revision)
    except Exception as error:  # of many kinds, by library and by version
        raise ValueError(
            f"model_index.json of {model.path!r} cannot be read ({first_line(error)}): it says how "
            "an empty prompt is embedded"
        ) from None
    return bool(config.get("force_zeros_for_empty_prompt", True))


def _text_model(model: Model) -> str:
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
