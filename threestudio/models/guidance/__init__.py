"""Guidance: from rendered images to losses that make them look like the prompt."""

from . import stable_diffusion_guidance, stable_diffusion_vsd_guidance

__all__ = ["stable_diffusion_guidance", "stable_diffusion_vsd_guidance"]
