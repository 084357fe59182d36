"""Priors, and the prompts for them: importing this registers them."""

from . import bridge, csd, ism, lods_embedding, lods_lora, nfsd, prompt, sdi, sds, vsd

__all__ = [
    "bridge",
    "csd",
    "ism",
    "lods_embedding",
    "lods_lora",
    "nfsd",
    "prompt",
    "sdi",
    "sds",
    "vsd",
]
