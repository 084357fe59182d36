"""What of a guidance's configuration has no effect, or makes no sense."""

import math
from collections.abc import Iterable

from lods import log
from lods import scores as formulas

from threestudio.utils.misc import C

# Fields that a prior does not read (guidance_scale_lora is of the original configurations, nor did
# the original), and the values at which nothing needs to be said.
LORA_FIELDS = {
    "lora_rank": (4,),
    "lora_scale": (0.5,),
    "pretrained_model_name_or_path_lora": (None, ""),
}
WITHOUT_EFFECT = {
    "guidance_scale_lora": (1.0, 7.5),
    "prompt_scale": (1.0,),
    "lora_cfg_training": (True,),
    "camera_condition_type": ("extrinsics",),
    "embedding_start": ("negative",),
    "lora_n_timestamp_samples": (1,),
    **LORA_FIELDS,
}
# field -> (its default, the other field that has to be set for it, the value at which it is not)
NEEDS = {
    "timestep_schedule_steps": (0, "timestep_schedule", "random"),
    "sds_scale": (100.0, "sds_steps", 0),
    "prior_inner_lr": (1.0e-3, "prior_inner_steps", 0),
}
HIGH = 200.0  # above it, a guidance scale is LODS'


def unread(*read: str) -> dict[str, tuple]:
    """WITHOUT_EFFECT of a prior that reads these of its fields."""
    return {field: values for field, values in WITHOUT_EFFECT.items() if field not in read}


def tell(cfg, without_effect: dict[str, tuple], finite_scale: bool) -> None:
    """Warn of fields that have no effect, and of a guidance scale that a prior whose gradient grows
    with it (``finite_scale``) has probably from another's configuration."""
    for field, values in without_effect.items():
        if cfg[field] not in values:
            log.warn(f"guidance: {field}={cfg[field]} has no effect")
    for field, (default, other, off) in NEEDS.items():
        if cfg[field] != default and cfg[other] == off and other not in without_effect:
            log.warn(f"guidance: {field}={cfg[field]} has no effect with {other}={off}")
    if finite_scale and cfg.guidance_scale > HIGH:
        log.warn(
            f"guidance: guidance_scale={cfg.guidance_scale:g} is of the configurations of LODS, "
            "which divides by it. Of this prior it multiplies the gradient: SDS is published with "
            "100, VSD, NFSD, SDI and ISM with 7.5, see the README"
        )


def wrong_schedules(cfg) -> Iterable[tuple[str, str]]:
    """``(field, what is wrong)`` where timesteps or clip of a later step make no sense: at a
    schedule's knots, since between them it is linear."""
    schedules = (cfg.min_step_percent, cfg.max_step_percent, cfg.grad_clip)
    lists = [list(s) for s in schedules if not isinstance(s, (int, float, str, type(None)))]
    steps = {0, *(int(x) for s in lists for x in s if isinstance(x, int) and x > 0)}
    for name in ("min_step_percent", "max_step_percent", "grad_clip"):
        if name == "grad_clip" and cfg.grad_clip is None:
            continue
        try:
            C(cfg[name], 0, 0)
        except TypeError as error:
            yield name, f"is no schedule: {error}"
            return
    for step in sorted(steps):
        low, high = (C(s, 0, step) for s in schedules[:2])
        if not 0 <= low <= high <= 1:
            yield (
                "min_step_percent",
                "and max_step_percent must be 0 <= min_step_percent <= max_step_percent <= 1, "
                f"not {low:g} and {high:g} (at step {step})",
            )
        if cfg.grad_clip is not None and not C(cfg.grad_clip, 0, step) > 0:
            yield "grad_clip", f"must be above 0, or null for none (at step {step})"


def check_lora_scale(scale: float) -> None:
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(
            f"lora_scale must be a number other than 0, not {scale}: with 0 the LoRA would never "
            "act, nor learn (system.guidance.lora_scale=0.5 in LODS, 1 in VSD)"
        )


def check_prompt_scale(scale: float) -> None:
    formulas.check_scale(scale, finite=True, name="prompt_scale")
