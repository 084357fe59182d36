"""Settings of a method that have no effect, or that probably belong to another method."""

from typing import Any

from lods import log

# field -> (its default, the other field that has to be set for it, the value at which it is not)
NEEDS = {
    "timestep_schedule_steps": (0, "timestep_schedule", "random"),
    "timestep_density": ("uniform", "timestep_schedule", "monotone"),
    "sds_scale": (100.0, "sds_steps", 0),
    "prior_inner_lr": (1.0e-3, "prior_inner_steps", 0),
}
HIGH = 200.0  # above it, a guidance scale is LODS'


def tell(cfg: Any, unread: tuple[str, ...], grows_with_scale: bool) -> None:
    """Warn of fields of a method's settings that have no effect, and of a guidance scale that a
    method whose gradient grows with it has probably from another's configuration. ``unread``:
    fields that the method itself does not read."""
    for field, (default, other, off) in NEEDS.items():
        if not hasattr(cfg, field) or field in unread or other in unread:
            continue
        if getattr(cfg, field) != default and getattr(cfg, other) == off:
            log.warn(f"guidance: {field}={getattr(cfg, field)} has no effect with {other}={off}")
    if grows_with_scale and cfg.guidance_scale > HIGH:
        log.warn(
            f"guidance: guidance_scale={cfg.guidance_scale:g} is of the configurations of LODS, "
            "which divides by it. Of this method it multiplies the gradient: SDS is published with "
            "100, VSD, NFSD, SDI and ISM with 7.5, see docs/methods.md"
        )
