"""The noise schedule of models that are diffusions, from their folder."""

from typing import Any

from lods.models.cards import Location, first_line
from lods.models.files import load_scheduler_config
from lods.models.schedule import MAX_TIMESTEPS


def load_ddpm(model: Location, name: str) -> Any:
    """diffusers' ``DDPMScheduler`` of a folder, whichever scheduler of a diffusion it names.
    ``name`` is what the model was asked for as. Raises ``ValueError``, one line."""
    from diffusers import DDPMScheduler

    config = load_scheduler_config(model)
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_TIMESTEPS:
        raise ValueError(
            f"the scheduler of {name!r} has num_train_timesteps={str(steps)[:30]}, not "
            f"1 to {MAX_TIMESTEPS}: the model folder is damaged"
        )
    try:
        return DDPMScheduler.from_config(config)
    except Exception as error:  # of many kinds, by library and by version
        raise ValueError(
            f"the scheduler of {name!r} cannot be made ({first_line(error)}): the model folder "
            "is damaged"
        ) from None
