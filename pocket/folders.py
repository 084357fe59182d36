"""Pipelines of diffusers as folders that old and new versions of the libraries load."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pocket.portable import make_portable
from pocket.tokenizer import save_tokenizer
from pocket.tools import whole_file


def save_stable_diffusion(folder: Path, **parts: Any) -> None:
    """Write a ``StableDiffusionPipeline`` of these parts, without a safety checker, in half
    precision."""
    from diffusers import StableDiffusionPipeline

    none: Any = dict.fromkeys(("safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)


def finish(folder: Path, words: Sequence[str], length: int, vocabulary: dict) -> None:
    """What a pipeline's folder needs besides what diffusers writes; ``words`` and ``length`` are
    those of its tokenizers."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):  # which safetensors writes for the owner alone
        file.chmod(0o666 & ~mask)
    for config in folder.glob("text_encoder*/config.json"):
        # transformers goes by this where diffusers goes by its own default, float32: they must
        # agree
        text = config.read_text().replace('"dtype": "float16"', '"dtype": "float32"')
        config.write_text(text)
    for part in folder.glob("tokenizer*"):  # also what older transformers read
        save_tokenizer(part, words, length)
    make_portable(folder)
    with whole_file(folder / "vocabulary.json") as tmp:
        tmp.write_text(json.dumps(vocabulary, indent=1) + "\n")
