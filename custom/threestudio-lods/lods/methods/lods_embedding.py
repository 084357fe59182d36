"""LODS with a learnt null-text embedding (arXiv:2312.04820)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from lods import scores as formulas
from lods.learned.files import read_safetensors, write_safetensors
from lods.methods.base import BaseGuidance
from lods.methods.options import unread
from lods.models.cards import resolve
from lods.models.unet import load_model_config
from torch import Tensor

import threestudio

STARTS = ("negative", "source")


@threestudio.register("lods-embedding-guidance")
class LODSEmbeddingGuidance(BaseGuidance):
    """g = w(t) [ eps(x_t; y) - eps / s + (1 - s) / s eps(x_t; e) ], with the embedding e learnt:

    ``loss_embedding`` = mean (eps(x_t'; e) - eps')^2 over what is being rendered. e (T, D), for
    SDXL with the pooled embedding as its last row, is shared by all views; it starts as the
    embedding of the negative prompt, or with ``embedding_start`` source of the text that describes
    the renders (see ``LODSPromptProcessor``), once, in ``initialize``: the buffer ``initialized``
    is saved with it, so that a resumed run goes on with what was learnt.
    """

    @dataclass
    class Config(BaseGuidance.Config):
        embedding_start: Annotated[str, STARTS] = "negative"

    cfg: Config
    without_effect = unread("prompt_scale", "lora_n_timestamp_samples", "embedding_start")

    def check(self) -> None:
        super().check()
        if self.cfg.embedding_start not in STARTS:
            raise ValueError(
                f"embedding_start must be one of {', '.join(STARTS)}, "
                f"not {self.cfg.embedding_start!r}"
            )

    def create_learned(self) -> None:
        name = self.cfg.pretrained_model_name_or_path
        model = resolve(name)
        config = load_model_config(model.path, "text_encoder", model.revision)
        tokens = config.get("max_position_embeddings")
        if tokens is None:
            raise ValueError(
                f"the text_encoder of {name!r} does not say how many tokens it takes "
                "(max_position_embeddings): it is not a CLIP text model"
            )
        # Its final shape from the start, so that checkpoints load before anything is rendered.
        self.learnable_embedding = torch.nn.Parameter(
            torch.zeros(
                tokens + self.denoiser.pooled_rows, self.denoiser.text_width, device=self.device
            )
        )
        self.unscale_gradients([self.learnable_embedding])
        self.register_buffer("initialized", torch.tensor(False, device=self.device))

    def _set(self, value: Float[Tensor, "T D"]) -> None:
        with torch.no_grad():
            self.learnable_embedding.copy_(value)
        self.initialized.fill_(True)

    def start_from(self, prompt_utils) -> None:
        null = prompt_utils.uncond_text_embeddings[0]
        if null.shape != self.learnable_embedding.shape:
            raise ValueError(
                f"the negative prompt's embedding is {tuple(null.shape)}, the learnt one "
                f"{tuple(self.learnable_embedding.shape)}: give prompt_processor and guidance the "
                "same pretrained_model_name_or_path"
            )
        if self.initialized:
            return
        if self.cfg.embedding_start == "source":
            null = self.other_text(prompt_utils, "source").text_embeddings[0]
        self._set(null)

    def _null(self, rows: int) -> Float[Tensor, "B T D"]:
        return self.learnable_embedding.expand(rows, -1, -1)

    def learn(self, latents, prompt, null) -> dict[str, Float[Tensor, ""]]:
        def predict(x_t, t):
            return self.denoiser.predict_noise(x_t, t, self._null(len(x_t)))

        return {"loss_embedding": self.denoising_loss(latents, predict)}

    def gradient(self, x_t, t, eps, prompt, null) -> Float[Tensor, "B c h w"]:
        learnt = self._null(len(x_t))
        if self.cfg.prompt_scale == 1:
            eps_c, eps_u = self.predict_pair(x_t, t, prompt, learnt)
        else:
            eps_c, eps_n, eps_u = self.predict_pair(x_t, t, prompt, null, learnt)
            eps_c = formulas.cfg(eps_c, eps_n, self.cfg.prompt_scale)
        return formulas.lods(eps_c, eps_u, eps, self.cfg.guidance_scale, self.weight(t))

    def save_learned(self, path) -> Path:
        """Write ``learnable_embedding`` (T, D), float32, with the model's name as metadata."""
        metadata = {"format": "lods-embedding", "model": self.learnt_on}
        return write_safetensors(path, {"learnable_embedding": self.learnable_embedding}, metadata)

    def load_learned(self, path) -> dict[str, str]:
        tensors, metadata = read_safetensors(path)
        value = tensors.get("learnable_embedding")
        if value is None or value.shape != self.learnable_embedding.shape:
            found = {name: tuple(tensor.shape) for name, tensor in list(tensors.items())[:3]}
            raise ValueError(
                f"{path} does not fit: a learnable_embedding of "
                f"{tuple(self.learnable_embedding.shape)} is wanted, it holds {found}"
            )
        self._set(value)
        return metadata
