"""What the methods that edit share: a source, noised as the picture is, under a text of its own."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from lods import scores
from lods.methods import predictions
from lods.methods.base import Latents, Method
from lods.methods.conditions import Conditions
from lods.methods.inputs import check_images, check_latents, check_values
from torch import Tensor

NO_PERP_NEG = (
    "{} compares two texts, and Perp-Neg has negatives for one of them: set "
    "system.prompt_processor.use_perp_neg=false"
)
# of a host: what its system has to hand over, see lods.threestudio.guidance
NO_SOURCE = "{} edits a source: give source= (images from the same cameras) or source_latents="


class EditMethod(Method):
    """A method that compares a picture with a *source*: what was there before, seen from the same
    camera, at the same t and with the same noise, under a text of its own (``source_prompt``).

        method = lods.load("dds", prompt="a dog", source_prompt="a cat")
        method(images, cameras, source=images_before)   # or latents=, source_latents=

    A subclass defines :meth:`gradient`, and has the noised source from :meth:`noised_source`. Its
    gradient is exactly 0 where the picture is the source and both texts are the same: what is
    subtracted from each other comes from calls of the model with one shape, for rows of one call
    may differ in their last bits. So a step costs two calls of 2 B rows.
    """

    edits = True
    other_texts = ("edited",)
    # an edit starts at its source, which has the layout already
    unread: ClassVar[tuple[str, ...]] = ("sds_steps", "sds_scale")

    @dataclass
    class Config(Method.Config):
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.05
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.95
        weighting_strategy: Annotated[str, scores.WEIGHTINGS] = "uniform"

    cfg: Config

    # -- the source ------------------------------------------------------------------------------

    @torch.no_grad()
    def latents_of_source(
        self, images: Float[Tensor, "B 3 H W"] | None, latents: Latents | None
    ) -> Latents:
        """The latents of the source. An encoder may draw them: from images they are drawn with the
        random numbers that the picture's own latents will be drawn with, and so are the same where
        the images are. Raises ``ValueError`` for neither or both, and for other shapes."""
        if (images is None) == (latents is None):
            raise ValueError(NO_SOURCE.format(type(self).__name__))
        if images is not None:
            check_images(images)
            if not self._looked:
                check_values(images)
            device = self.model.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                latents = self.latents_of(images)
        check_latents(latents, self.model.latent_shape)
        assert latents is not None  # one of the two is given
        return latents.detach()

    def losses(self, latents: Latents, conditions: Conditions):
        """See :class:`lods.methods.base.Method`. Raises ``ValueError`` where the conditions have no
        source, or one of another size."""
        name, source = type(self).__name__, conditions.source
        if source is None:
            raise ValueError(NO_SOURCE.format(name))
        if source.shape != latents.shape:
            raise ValueError(
                f"the source has {len(source)} pictures, and {len(latents)} are edited: one for "
                "each, from the same camera"
                if source.shape[1:] == latents.shape[1:]
                else f"the source's latents are {tuple(source.shape)}, not {tuple(latents.shape)}"
            )
        if conditions.negatives:
            raise ValueError(NO_PERP_NEG.format(name))
        return super().losses(latents, conditions)

    def noised_source(self, t: Int[Tensor, " B"], eps: Latents, conditions: Conditions) -> Latents:
        """x_t of the source."""
        return self.model.add_noise(source_of(conditions), eps, t)

    # -- predictions -----------------------------------------------------------------------------

    def compared(
        self, x_t: Latents, x_source: Latents, t: Int[Tensor, " B"], conditions: Conditions, *texts
    ) -> tuple[predictions.Predictions, predictions.Predictions]:
        """The predictions at the picture under the prompt and then under ``texts``, and those at
        the source under its own text and then under ``texts``."""
        here = self.predict(x_t, t, conditions, conditions.prompt, *texts)
        return here, self.at_source(x_source, t, conditions, conditions.others["edited"], *texts)

    def at_source(self, x_source, t, conditions: Conditions, *texts) -> predictions.Predictions:
        """The predictions at the noised source, which nobody looks on at."""
        return predictions.one_call(self.model, x_source, t, conditions, *texts)

    def sds_stage(self):
        return 0, 1.0


def source_of(conditions: Conditions) -> Latents:
    """The latents of the source, which :meth:`EditMethod.losses` has seen to."""
    assert conditions.source is not None
    return conditions.source
