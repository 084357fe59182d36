"""Priors, and the prompts for them: importing this registers them."""

from . import lods_embedding, lods_lora, prompt, sds

__all__ = ["lods_embedding", "lods_lora", "prompt", "sds"]
