"""Methods that learn one of the two predictions of their gradient while they distil."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods import log, scores
from lods.cameras import Cameras
from lods.learned.inner import InnerAdam
from lods.methods import timesteps
from lods.methods.base import Method
from lods.methods.conditions import Conditions
from lods.models.base import Model, views_of
from lods.models.cards import FORMER, noted
from torch import Tensor

SEVERAL = (
    "prior_inner_steps would teach the learned part of each GPU something else: train on one GPU "
    "(--gpu 0), or set system.guidance.prior_inner_steps=0"
)


class LearningMethod(Method):
    """A method whose parameters are learned by losses of its own, on what is being rendered.

    It defines :meth:`create_learned`, :meth:`learning_losses` (see :meth:`denoising_loss`),
    ``save_learned`` and ``load_learned``.
    """

    @dataclass
    class Config(Method.Config):
        # (t, noise) draws per image for the learned part's loss
        lora_n_timestamp_samples: Annotated[int, "[1, 1000]"] = 1
        # so many updates of the learned part before each gradient, by an Adam of its own with this
        # rate, in place of one by the trainer's optimizer after it (0)
        prior_inner_steps: Annotated[int, "[0, 10000]"] = 0
        prior_inner_lr: Annotated[float, "(0, 1e6]"] = 1.0e-3
        # how the learned part's t is drawn from all T: trained, as the model's own training did
        # (uniform for a diffusion, logit-normal for a flow)
        learned_density: Annotated[str, timesteps.LEARNED_DENSITIES] = "trained"

    cfg: Config

    def __init__(self, model: Model, config: Any = None, **values: Any):
        super().__init__(model, config, **values)
        self.inner: InnerAdam | None = None
        if self.cfg.prior_inner_steps:
            self.inner = InnerAdam(list(self.parameters()), self.cfg.prior_inner_lr)

    # -- hooks ---------------------------------------------------------------------------------

    def learning_losses(
        self, latents: Float[Tensor, "B c h w"], conditions: Conditions
    ) -> dict[str, Float[Tensor, ""]]:
        """``loss_*`` of the learned part."""
        raise NotImplementedError(f"{type(self).__name__} does not define learning_losses")

    def write_learned(self, path: Path, metadata: dict[str, str]) -> Path:
        """Write the learned part with this metadata."""
        raise NotImplementedError(f"{type(self).__name__} does not define write_learned")

    def read_learned(self, path: Path) -> dict[str, str]:
        """Take over the learned part of a file; returns its metadata."""
        raise NotImplementedError(f"{type(self).__name__} does not define read_learned")

    def moved(self) -> tuple[float, str] | None:
        """How far the learned part is from what it started as, relative and without a unit, and
        the formula; None where that is not known."""
        return None

    @property
    def learned_on(self) -> str:
        """The name of the model that the learned part belongs to."""
        return noted(self.model.name)

    @property
    def _latents(self) -> str:
        return "x".join(map(str, self.model.latent_shape))

    # -- learning --------------------------------------------------------------------------------

    def learn(self, latents, conditions: Conditions) -> dict[str, Float[Tensor, ""]]:
        """The losses of the learned part, to go into the total; with ``prior_inner_steps`` the
        part is updated here, and the last update's losses are returned without a graph."""
        if self.inner is None:
            return self.learning_losses(latents, conditions)
        ranks = torch.distributed
        if ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1:
            raise ValueError(SEVERAL)
        losses: dict[str, Tensor] = {}
        for _ in range(self.cfg.prior_inner_steps):
            with torch.enable_grad():  # also where the images are only looked at
                losses = self.learning_losses(latents, conditions)
                total = sum(losses.values(), torch.zeros((), device=latents.device))
            self.inner.step(torch.autograd.grad(total, self.inner.learned))
        return {name: value.detach() for name, value in losses.items()}

    def denoising_loss(self, latents: Float[Tensor, "B c h w"], predict) -> Float[Tensor, ""]:
        """mean (a_hat - a)^2 over ``lora_n_timestamp_samples`` draws of (t, eps) per image, with a
        what the model's own training had the mean square of (the schedule's ``space``): of noise,
        eps_hat - eps, for a diffusion; of velocities, (eps_hat - eps) / alpha_t, for a flow. t is
        drawn from 0..T-1 by ``learned_density``, one for all views that the model sees at once;
        image i is row i, i + B, i + 2B, ...

        These predictions have a call of their own. As rows of the gradient's call they would save
        one, but the backward pass would go through all 3B rows: 6 forward passes' worth of B rows
        in place of 4, and the activations of three times the rows. ``benchmarks/guidance.py``
        times that as "ours one call".
        """
        schedule, density = self.model.schedule, self.cfg.learned_density
        z = latents.detach().repeat(self.cfg.lora_n_timestamp_samples, 1, 1, 1)
        last, chosen = schedule.steps - 1, None if density == "trained" else density
        views = views_of(self.model)  # which have one t
        t = schedule.draw(len(z) // views, 0, last, z.device, chosen).repeat_interleave(views)
        eps = torch.randn_like(z)
        eps_hat = predict(self.model.add_noise(z, eps, t), t)
        if schedule.space == "noise":
            return F.mse_loss(eps_hat, eps)
        ones = torch.ones(len(z), device=z.device)
        # the square of a difference in that space is this times the square of one of noise
        scale = scores.rows(schedule.convert_weight(ones, t, schedule.space, "noise"), z)
        return ((eps_hat - eps) * scale).square().mean()

    def cameras_of_draws(self, conditions: Conditions) -> Cameras | None:
        """The cameras of the rows of :meth:`denoising_loss`."""
        cameras = conditions.cameras
        return cameras and cameras.repeat(self.cfg.lora_n_timestamp_samples)

    def unscale_gradients(self, parameters) -> None:
        """Undo the ``grad_scale`` of ``Model.predict`` on what is learned through it."""
        if self.model.grad_scale != 1:
            for parameter in parameters:
                parameter.register_hook(lambda grad: grad / self.model.grad_scale)

    def loss_is_scaled(self) -> None:
        """To be called where the trainer multiplies the loss itself, as a GradScaler does: both
        factors together would overflow in float16 at a small batch, and cost the first steps."""
        if self.inner is None:  # whose losses the trainer does not see
            for model in self.models():
                model.grad_scale = 1.0

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the learned part to a safetensors file, with the name of the model, the shape of
        its latents and, where it is known, how far it has moved as metadata."""
        metadata = {"model": self.learned_on, "latents": self._latents}
        if added := str(getattr(self.model, "additions", "")):
            metadata["model_with"] = added
        if (moved := self.moved()) is not None:
            metadata |= {"moved": f"{moved[0]:.6g}", "moved_is": moved[1]}
        return self.write_learned(Path(path), metadata)

    def load(self, path: str | Path) -> dict[str, str]:
        """Start from a file of :meth:`save`; returns its metadata. Warns if it was learned on
        another model, raises ``ValueError``, one line, if it does not fit."""
        metadata = self.read_learned(Path(path))
        model, latents = metadata.get("model"), metadata.get("latents")
        named = None if model is None else noted(model)
        if named is not None and latents is None:  # a file of version 0.2 or before
            named = FORMER.get(named, named)
        if named not in (None, self.learned_on) or latents not in (None, self._latents):
            log.warn(f"guidance: {path} was learned on {model!r}, not {self.learned_on!r}")
        log.info(f"guidance: the learned part starts from {path}")
        return metadata
