"""Prompt processors: from a prompt to text embeddings, one per viewing direction."""

from . import base, dummy_prompt_processor, stable_diffusion_prompt_processor

__all__ = ["base", "dummy_prompt_processor", "stable_diffusion_prompt_processor"]
