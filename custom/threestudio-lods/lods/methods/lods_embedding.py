"""LODS with a learned null-text embedding (arXiv:2312.04820)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from lods import scores
from lods.learned import embedding
from lods.methods.learning import LearningMethod
from lods.methods.reconstruction import Rescaling, rescaled
from lods.methods.registry import register
from lods.models.base import text_layout
from lods.models.text_layout import LEARNABLE
from torch import Tensor, nn


@register("lods-embedding")
class LODSEmbedding(LearningMethod):
    """g = w(t) [ eps(x_t; y) - eps / s + (1 - s) / s eps(x_t; e) ], with the embedding e learned:

    ``loss_embedding`` = mean (eps(x_t'; e) - eps')^2 over what is being rendered (of a flow, the
    mean square of its velocities). e (T, D), with a pooled vector after its tokens where the model
    takes one (:mod:`lods.models.text_layout`), is shared by all views; it starts as the embedding
    of the negative prompt, or with ``embedding_start`` source of the text that describes
    the renders, once: the buffer ``initialized`` is saved with it, so that a resumed run goes on
    with what was learned. ``learned_text`` chooses what of it learns; the rest stays as it starts.
    """

    @dataclass
    class Config(Rescaling, LearningMethod.Config):
        # r of cfg_r(eps(x_t; y), eps(x_t; n)), which takes the place of eps(x_t; y) as in VSD: the
        # renders then tend to samples with that guidance scale. 1: as published
        prompt_scale: Annotated[float, "(0, 1e6]"] = 1.0
        # negative, it starts as the negative prompt; source, as the text of what the renders
        # look like
        embedding_start: Annotated[str, ("negative", "source")] = "negative"
        # what of it is learned: all, the tokens alone, or the pooled vector alone (of SDXL, SD3 or
        # FLUX), a few thousand numbers in place of a million
        learned_text: Annotated[str, LEARNABLE] = "all"

    cfg: Config

    def create_learned(self) -> None:
        # its final shape from the start, so that checkpoints load before anything is rendered
        zeros = torch.zeros(*self.model.text_shape, device=self.model.device)
        self.learnable_embedding = nn.Parameter(zeros)
        self.unscale_gradients([self.learnable_embedding])
        layout = text_layout(self.model)
        learned = layout.learnable(self.cfg.learned_text).to(self.model.device)
        # a mask is never learned; with all of a model without one, there is nothing to hold fast
        whole = self.cfg.learned_text == "all" and not layout.masked
        self.register_buffer("_learned", None if whole else learned, persistent=False)
        self.register_buffer("fixed_embedding", None if whole else torch.zeros_like(zeros))
        self.initialized: Tensor
        self._learned: Tensor | None
        self.fixed_embedding: Tensor | None
        self.register_buffer("initialized", torch.tensor(False, device=self.model.device))
        self._start: Tensor | None = None  # the text's embedding that it starts as

    def _set(self, value) -> None:
        with torch.no_grad():
            self.learnable_embedding.copy_(value)
            if self.fixed_embedding is not None:
                self.fixed_embedding.copy_(value)
        self.initialized.fill_(True)

    def start_from(self, prompts) -> None:
        null = prompts.plain("null")
        if null.shape != self.learnable_embedding.shape:
            raise ValueError(
                f"the negative prompt's embedding is {tuple(null.shape)}, the learned one "
                f"{tuple(self.learnable_embedding.shape)}: give prompt_processor and guidance the "
                "same pretrained_model_name_or_path"
            )
        self._start = prompts.plain("source") if self.cfg.embedding_start == "source" else null
        if not self.initialized:
            self._set(self._start)

    def moved(self):
        """|e - e0| / |e0|, with e0 the embedding of the text that it starts as (also where it
        started from a file)."""
        if self._start is None:
            return None
        start = self._start.to(self.learnable_embedding.device).float()
        distance = (self.embedding.detach().float() - start).norm() / start.norm()
        return float(distance), f"|e - e0| / |e0|, e0 the {self.cfg.embedding_start} text's"

    @property
    def embedding(self) -> Tensor:
        """e (T, D): what is learned, and the rest as it started."""
        if self._learned is None or self.fixed_embedding is None:
            return self.learnable_embedding
        return torch.where(self._learned, self.learnable_embedding, self.fixed_embedding)

    def _null(self, rows: int):
        return self.embedding.expand(rows, -1, -1)

    def learning_losses(self, latents, conditions):
        cameras = self.cameras_of_draws(conditions)

        def predict(x_t, t):
            return self.model.predict(x_t, t, self._null(len(x_t)), cameras)

        return {"loss_embedding": self.denoising_loss(latents, predict)}

    def gradient(self, x_t, t, eps, conditions):
        y, n, learned = conditions.prompt, conditions.null, self._null(len(x_t))
        if self.cfg.prompt_scale == 1:
            eps_c, eps_u = self.predict(x_t, t, conditions, y, learned)
        else:
            eps_c, eps_n, eps_u = self.predict(x_t, t, conditions, y, n, learned)
            eps_c = scores.cfg(eps_c, eps_n, self.cfg.prompt_scale)
        found = scores.lods(eps_c, eps_u, eps, self.cfg.guidance_scale, self.weight(t))
        return rescaled(self, found, x_t, t, eps_c, eps_u)

    def write_learned(self, path, metadata):
        return embedding.save(path, self.embedding, metadata)

    def read_learned(self, path):
        value, metadata = embedding.load(path, self.learnable_embedding.shape)
        self._set(value)
        return metadata
