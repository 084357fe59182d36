"""Priors: importing this registers them."""

from . import lods_embedding, lods_lora, sds

__all__ = ["lods_embedding", "lods_lora", "sds"]
