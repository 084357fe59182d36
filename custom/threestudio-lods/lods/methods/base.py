"""What all methods share: encode, draw (t, noise), ask for the gradient, make it a loss."""

import dataclasses
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lods import log, schedules, scores, settings
from lods.cameras import Cameras
from lods.methods import predictions, timesteps
from lods.methods.conditions import Conditions, Prompts
from lods.methods.inputs import cameras_for, check_images, check_latents, check_values, resized
from lods.methods.losses import Losses
from lods.methods.sds_first import SDSFirst
from lods.methods.sight import Sight
from lods.models.base import Model, views_of
from lods.models.schedule import DENSITIES
from torch import Tensor, nn

Latents = Float[Tensor, "B c h w"]


class Method(nn.Module):
    """One way to make a gradient for images out of a frozen model's predictions.

    ``method(images)`` returns :class:`Losses`. A method defines :meth:`gradient`, and its own
    ``Config`` if it has settings; where it needs them :meth:`diffuse` (how x_t is made) and
    ``other_texts`` (beside prompt and null prompt). The parameters of the module are the learned
    part (see :class:`lods.methods.learning.LearningMethod`); the model is frozen and not part of
    its ``state_dict``.
    """

    @dataclass
    class Config:
        """The settings of all methods."""

        # s of the formulas, above 0; .inf for the LODS methods
        guidance_scale: Annotated[float, "(0, inf]"] = 7.5
        # so many first steps follow SDS over its scale, see :mod:`.sds_first`
        sds_steps: Annotated[int, "[0, 1e12]"] = 0
        sds_scale: Annotated[float, "(0, 1e9]"] = 100.0
        # t is drawn from int(T min) .. int(T max), both included; schedules allowed. Parts of the
        # timesteps, not of the noise: see lods.models.schedule.RectifiedFlow for flows
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.02
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.98
        # how: random, or monotone, the same t for all rows, which falls with the step (of HiFA,
        # arXiv:2305.18766): max - (max - min) sqrt(step / timestep_schedule_steps)
        timestep_schedule: Annotated[str, timesteps.KINDS] = "random"
        timestep_schedule_steps: Annotated[int, "[0, 1e12]"] = 0
        # of random t within the range: each alike, or more of those in the middle of T
        timestep_density: Annotated[str, DENSITIES] = "uniform"
        # every element of the gradient is clamped to +- this; schedules allowed
        grad_clip: Annotated[Any | None, "scheduled (0, inf]"] = None
        # w(t), see scores.weight
        weighting_strategy: Annotated[str, scores.WEIGHTINGS] = "sds"

        def contradictions(self):
            """Fields that do not go together: (field, what is wrong)."""
            yield from timesteps.contradictions(self)

    # whether the gradient grows with guidance_scale, which then has to be finite
    grows_with_scale: ClassVar[bool] = False
    other_texts: ClassVar[tuple[str, ...]] = ()  # names for Conditions.others: "source", "bad"
    unread: ClassVar[tuple[str, ...]] = ()  # settings of all methods that this one does not read
    # whether its gradient needs the prediction of a model that is not guided, which a
    # guidance-distilled model does not have
    needs_null: ClassVar[bool] = True
    edits: ClassVar[bool] = False  # whether it changes a source, see lods.methods.editing

    def __init__(self, model: Model, config: Any = None, **values: Any):
        """``config``: an instance of the class's ``Config``, or ``values`` for one."""
        super().__init__()
        self.refuse_distilled(getattr(model, "no_null", ""))
        self.model = model
        self.cfg = settings.make(type(self).Config, values) if config is None else config
        self.prompts: Prompts | None = None
        self._lost: Tensor | None = None  # share of the last gradient that was not finite
        self._warned: set[bool] = set()
        self._looked = False  # at the values of an image
        self.sight: Sight | None = None  # what the model saw last, where that is kept
        self.step(0)
        self.create_learned()
        self.distil = SDSFirst(self, *self.sds_stage())
        for each in self.models():
            each.prepare(self.recompute_context)

    @classmethod
    def refuse_distilled(cls, reason: str) -> None:
        """Raise ``ValueError``, one line, if the method needs the null prediction that a model does
        not have, for this ``reason`` ("": it has one)."""
        if cls.needs_null and reason:
            raise ValueError(f"{cls.__name__} needs a null prediction: {reason}")

    # -- hooks ---------------------------------------------------------------------------------

    def gradient(
        self, x_t: Latents, t: Int[Tensor, " B"], eps: Latents, conditions: Conditions
    ) -> Latents:
        """The gradient with respect to the latents z (called without autograd); ``eps`` is the
        noise of :meth:`diffuse`."""
        raise NotImplementedError(f"{type(self).__name__} does not define gradient")

    def diffuse(
        self, latents: Latents, t: Int[Tensor, " B"], conditions: Conditions
    ) -> tuple[Latents, Latents]:
        """x_t, and the noise that ``gradient`` compares predictions with: here freshly drawn."""
        return predictions.fresh_noise(self.model, latents, t)

    def create_learned(self) -> None:
        """Make the learned part; called once, when the model is there."""

    def learn(self, latents: Latents, conditions: Conditions) -> dict[str, Float[Tensor, ""]]:
        """The losses of the learned part on detached latents; none here."""
        return {}

    def start_from(self, prompts: Prompts) -> None:
        """Start the learned part from the prompts' embeddings; called once, by :meth:`start`."""

    def models(self) -> tuple[Model, ...]:
        """All models that are called: ``self.model``, and others of the learned part."""
        return (self.model,)

    def sds_stage(self) -> tuple[int, float]:
        """(steps, scale) of the SDS that comes before the method's own gradient."""
        return self.cfg.sds_steps, self.cfg.sds_scale

    def recompute_context(self) -> Callable[[], AbstractContextManager[Any]]:
        """What makes the context in which the network runs now, see
        :func:`lods.models.memory.checkpoint_blocks`."""
        return nullcontext

    # -- what a gradient is made of --------------------------------------------------------------

    def predict(self, x_t, t, conditions: Conditions, *texts) -> predictions.Predictions:
        """The noise predictions under these texts, in rows of one call; with the negatives of
        Perp-Neg in the conditions the first is composed with them."""
        found = predictions.predict(self.model, x_t, t, conditions, *texts)
        if self.sight is not None:
            self.sight.keep(x_t, t, conditions, texts, found)
        return found

    def weight(self, t: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """w(t) of the configured ``weighting_strategy``."""
        return self.model.schedule.weight(t, self.cfg.weighting_strategy)

    # -- a step ----------------------------------------------------------------------------------

    def step(self, step: int, epoch: int = 0) -> None:
        """Set what depends on the step: the range of t and the clip."""
        try:
            step = operator.index(step)
        except TypeError:
            raise ValueError(f"a step is a whole number, not {step!r}") from None
        if step < 0:
            raise ValueError(f"steps count from 0: {step} is none")
        self.now = step
        bounds = timesteps.range_at(self.cfg, self.model.schedule.steps, step, epoch)
        self.min_step, self.max_step = bounds
        clip = self.cfg.grad_clip
        self.grad_clip = None if clip is None else schedules.value_at(clip, step, epoch)

    def start(self, prompts: Prompts) -> None:
        """Take these prompts, and start the learned part from them; a second call changes nothing.

        Raises ``ValueError`` if the embeddings are of another model.
        """
        if self.prompts is not None:
            return
        width = prompts.plain("null").shape[-1]
        if width != self.model.text_width:
            raise ValueError(
                f"the prompt's embeddings have width {width}, the guidance's model takes "
                f"{self.model.text_width}: give prompt_processor and guidance the same "
                "pretrained_model_name_or_path, and for SDXL set "
                "system.prompt_processor_type=lods-prompt-processor"
            )
        for text in self.other_texts:  # one that cannot be had is told now, not at a step
            prompts.plain(text)
        self.start_from(prompts)
        self.prompts = prompts

    def latents_of(self, images: Float[Tensor, "B 3 H W"]) -> Latents:
        """Latents of images in 0..1, which are resized to the model's size first."""
        return self.model.encode(resized(images, self.model.image_size))

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"] | None = None,
        cameras: Cameras | None = None,
        latents: Latents | None = None,
        source: Float[Tensor, "B 3 h2 w2"] | None = None,
        source_latents: Latents | None = None,
    ) -> Losses:
        """The losses of images in 0..1, or of ``latents``, seen from these cameras (by default
        all from the front; a model that is told the cameras themselves needs them, with their field
        of view). A method that edits also takes what was there before, seen from the same cameras:
        ``source``, images of any size, or ``source_latents``. Raises ``ValueError`` for neither or
        both, for other shapes, and without prompts."""
        if self.prompts is None:
            raise ValueError("the method has no prompt yet: make it by lods.load, or call start")
        if (images is None) == (latents is None):
            raise ValueError("give either images (B, 3, H, W) in 0..1, or latents=")
        before = self.latents_of_source(source, source_latents)
        if images is not None:
            check_images(images)
            if not self._looked:  # later calls would have to wait for a GPU each time
                self._looked = True
                check_values(images)
            latents = self.latents_of(images)
        check_latents(latents, self.model.latent_shape)
        assert latents is not None  # one of the two is given
        told, views = getattr(self.model, "cameras", "words"), views_of(self.model)
        cameras = cameras_for(cameras, latents, told, views)
        conditions = self.prompts.conditions(cameras, self.other_texts)
        return self.losses(latents, dataclasses.replace(conditions, source=before))

    def latents_of_source(
        self, images: Float[Tensor, "B 3 H W"] | None, latents: Latents | None
    ) -> Latents | None:
        """Those of what is edited: of nothing here. Raises ``ValueError`` where something is given
        all the same."""
        if images is not None or latents is not None:
            raise ValueError(f"{type(self).__name__} edits nothing: leave source out, or take dds")
        return None

    def losses(self, latents: Latents, conditions: Conditions) -> Losses:
        """``loss_sds`` = 1/2 sum (z - stopgrad(z - g))^2 / B, whose gradient is g / B; the losses
        of the learned part; and, to log, ``grad_norm`` (of g), ``min_step`` and ``max_step``."""
        learning = self.learn(latents, conditions)
        raw = self.distil(latents, conditions)
        if getattr(raw, "shape", None) != latents.shape:
            raise ValueError(
                f"the gradient of {type(self).__name__} must be a tensor {tuple(latents.shape)}, "
                f"as the latents, not {tuple(raw.shape) if isinstance(raw, Tensor) else raw!r}"
            )
        grad = self.clean(raw)
        loss = self.pull(latents, (latents - grad).detach())
        numbers = {
            "grad_norm": grad.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }
        return Losses({"loss_sds": loss, **learning}, numbers)

    def pull(self, latents: Latents, target: Latents) -> Float[Tensor, ""]:
        """``loss_sds`` of latents that are led to ``target``, z - g: 1/2 sum (z - target)^2 / B."""
        return 0.5 * F.mse_loss(latents, target, reduction="sum") / len(latents)

    def own_gradient(
        self, latents: Latents, t: Int[Tensor, " B"], conditions: Conditions
    ) -> Latents:
        """The method's gradient for one draw of the noise, before it is cleaned."""
        x_t, eps = self.diffuse(latents, t, conditions)
        return self.gradient(x_t, t, eps, conditions)

    @torch.no_grad()
    def clean(self, raw: Latents) -> Latents:
        """``raw`` with its elements that are not finite as 0, then clamped to +- ``grad_clip``.

        It warns once that some were not finite, and once that all were, a step later: a GPU would
        have to be waited for to know this step's share."""
        share = 0.0 if self._lost is None else float(self._lost)
        if share > 0 and (share == 1) not in self._warned:
            self._warned.add(share == 1)
            log.warn(
                f"guidance: {100 * share:.3g} % of a gradient's elements were nan or inf, and "
                "count as 0" + (": nothing is learned from such a step" if share == 1 else "")
            )
        self._lost = (~torch.isfinite(raw)).float().mean()
        grad = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0)
        return grad if self.grad_clip is None else grad.clamp(-self.grad_clip, self.grad_clip)

    def set_guidance_scale(self, value: float) -> None:
        """Go on with another guidance scale. Raises ``ValueError`` outside the range of the
        method's ``Config``."""
        hint = settings.annotations(type(self.cfg))["guidance_scale"]
        checked = settings.check("guidance_scale", value, hint)
        self.cfg = dataclasses.replace(self.cfg, guidance_scale=checked)

    # -- looking on ------------------------------------------------------------------------------

    def watch(self, wanted: bool = True) -> None:
        """Keep what the model sees from the next step on, or no longer. That costs references to
        tensors that are there anyway, and changes nothing of what is computed."""
        self.sight = Sight() if wanted else None

    def seen(self) -> dict[str, Float[Tensor, "B 3 H W"]]:
        """Of the last step that was watched, as images in 0..1, decoded now: what the model was
        given ("noisy"), the clean image that each of its two predictions means ("guess under the
        prompt", and "guess of the learned part" or under the other text), and "difference" of the
        two, 1/2 where there is none. Empty before such a step."""
        return {} if self.sight is None else self.sight.images(self.model)

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path | None:
        """Write the learned part to a safetensors file and return its path; None, and nothing
        written, for a method that learns nothing."""
        return None

    def load(self, path: str | Path) -> dict[str, str]:
        """Start the learned part from a file of :meth:`save`; returns the file's metadata."""
        raise ValueError(f"{type(self).__name__} learns nothing: the file {path} has no use")
