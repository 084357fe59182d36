"""Which timesteps a method looks at: their range, which may change with the step, and the draw."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from lods import schedules
from lods.models.schedule import DENSITIES, Schedule
from torch import Tensor

KINDS = ("random", "monotone")
LEARNED_DENSITIES = ("trained", *DENSITIES)


def range_at(cfg: Any, steps: int, step: int, epoch: int = 0) -> tuple[int, int]:
    """(the smallest, the largest t) at a step, both included, of a schedule with ``steps``
    timesteps: int(T min_step_percent) and int(T max_step_percent)."""
    low = schedules.value_at(cfg.min_step_percent, step, epoch)
    high = schedules.value_at(cfg.max_step_percent, step, epoch)
    if not 0 <= low <= high <= 1:  # a schedule in epochs, which the Config cannot see
        raise ValueError(
            f"0 <= min_step_percent <= max_step_percent <= 1 is needed, not {low} and {high} "
            f"(at step {step})"
        )
    return min(int(steps * low), steps - 1), min(int(steps * high), steps - 1)


def draw(
    cfg: Any,
    bounds: tuple[int, int],
    step: int,
    rows: int,
    device: torch.device,
    schedule: Schedule,
) -> Int[Tensor, " B"]:
    """t of each row within ``bounds``, by ``timestep_schedule``: at random, by
    ``timestep_density`` (see :meth:`lods.models.schedule.Schedule.draw`); or monotone, the same for
    all rows, max - (max - min) sqrt(step / timestep_schedule_steps), of HiFA (arXiv:2305.18766)."""
    low, high = bounds
    if cfg.timestep_schedule == "monotone":
        done = min(step / cfg.timestep_schedule_steps, 1.0) ** 0.5
        return torch.full((rows,), round(high - (high - low) * done), device=device)
    return schedule.draw(rows, low, high, device, cfg.timestep_density)


def contradictions(cfg: Any) -> Iterator[tuple[str, str]]:
    """``(field, what is wrong)`` where timesteps or clip of a later step make no sense."""
    names = ("min_step_percent", "max_step_percent", "grad_clip")
    values = [getattr(cfg, name) for name in names]
    for name, value in zip(names, values):
        try:
            schedules.value_at(0 if value is None else value, 0)
        except TypeError as error:
            yield name, f"is no schedule: {error}"
            return
    for step in schedules.steps_of(*values):
        low, high = (schedules.value_at(value, step) for value in values[:2])
        if not 0 <= low <= high <= 1:
            yield (
                "min_step_percent",
                "and max_step_percent must be 0 <= min_step_percent <= max_step_percent <= 1, "
                f"not {low:g} and {high:g} (at step {step})",
            )
        if values[2] is not None and not schedules.value_at(values[2], step) > 0:
            yield "grad_clip", f"must be above 0, or null for none (at step {step})"
    if cfg.timestep_schedule == "monotone" and cfg.timestep_schedule_steps < 1:
        yield (
            "timestep_schedule",
            "=monotone needs the number of steps in which t falls: set timestep_schedule_steps, "
            "for example to trainer.max_steps",
        )
