"""What the families share that are rectified flows over a transformer."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.models.cards import Location
from lods.models.files import cannot_be_had
from lods.models.latent import MAX_LATENT_SIZE, LatentModel, halved
from lods.models.schedule import flow_schedule
from torch import Tensor


class FlowModel(LatentModel):
    """A transformer that predicts v = eps - z, and the schedule of diffusers' flow scheduler;
    ``predict`` returns eps = x_t + alpha_t v (:class:`lods.models.latent.LatentModel`).

    A family says with :meth:`image_tokens` how many tokens a picture is, by which some schedules
    are shifted.
    """

    part = "transformer"

    def __init__(self, transformer, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        tokens = self.image_tokens(transformer, vae)
        config = self.schedule_config(dict(getattr(scheduler, "config", scheduler)), tokens)
        try:
            schedule = flow_schedule(config, tokens)
        except ValueError as error:
            raise ValueError(
                f"the scheduler of {name!r} does not serve: {error}; the model folder is damaged, "
                "or of another kind"
            ) from None
        width = self.width_of(transformer)
        super().__init__(transformer, vae, schedule, "flow", width, device, name, shares_vae)

    @classmethod
    def image_tokens(cls, transformer: Any, vae: Any) -> int:
        """The tokens that a picture of the model's own size is to the transformer, of squares of
        ``packs`` latent pixels; 0 for a size that :meth:`sizes` refuses."""
        _, side = cls.side_of(transformer, vae)
        return (side // cls.packs) ** 2 if isinstance(side, int) else 0

    @classmethod
    def schedule_config(cls, config: dict[str, Any], tokens: int) -> dict[str, Any]:
        """What :func:`lods.models.schedule.flow_schedule` takes of the scheduler's config."""
        return config

    @classmethod
    def width_of(cls, transformer: Any) -> int:
        """Width of the rows that stand for a text."""
        return transformer.config.joint_attention_dim

    @classmethod
    def load_schedule(cls, model: Location, name: str) -> Any:
        """The config of diffusers' flow scheduler."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        try:
            config: Any = FlowMatchEulerDiscreteScheduler.load_config(
                model.path, subfolder="scheduler", revision=model.revision
            )
        except Exception as error:  # of many kinds, by library and by version
            raise ValueError(cannot_be_had(model.path, "scheduler", error)) from None
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind != FlowMatchEulerDiscreteScheduler.__name__:
            raise ValueError(
                f"the scheduler of {name!r} is a {str(kind)[:60]}; a flow has a "
                f"{FlowMatchEulerDiscreteScheduler.__name__}"
            )
        return config


def side_by_vae(vae: Any, packs: int) -> tuple[str, int]:
    """``LatentModel.side_of`` where the transformer takes pictures of any size and does not say its
    own: from the VAE. Raises ``ValueError``, one line, for a size that cannot be."""
    side, factor = vae.config.sample_size, halved(vae)
    most = factor * MAX_LATENT_SIZE
    if not isinstance(side, int) or not 1 <= side <= most or side % (factor * packs):
        raise ValueError(
            f"the vae's sample_size is {str(side)[:30]}, not a multiple of {factor * packs} up to "
            f"{most}: the model folder is damaged, or of another kind"
        )
    return "vae", side // factor


def pack(z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B L 4C"]:
    """Each square of 2 x 2 latent pixels as one token, row by row; in a token the channels are the
    outer index, and the four pixels of each the inner."""
    return F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Float[Tensor, "B L 4C"], height: int) -> Float[Tensor, "B C h w"]:
    """The way back, to latents of ``height`` pixels."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, -1)), 2)


def grid(height: int, width: int, device: Any) -> Float[Tensor, "L 2"]:
    """(row, column) of each token of a picture that is so many tokens."""
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in (height, width))
    return torch.cartesian_prod(rows, columns)
