"""What trainings of networks share: pictures as tensors, learning rates, states on disk."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8


def to_tensor(images: UInt8[np.ndarray, "N H W 3"]) -> Float[torch.Tensor, "N 3 H W"]:
    """Pictures of 0..255 as float32 in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def save_state(path: Path, **state: Any) -> None:
    """Write a training state in one piece: a reader sees the old file or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def cosine(step: int, steps: int, peak: float, warm: int = 100) -> float:
    """The learning rate at ``step`` of ``steps``: linear from 0 to ``peak`` in ``warm`` steps, then
    half a cosine down to 2 % of it."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.51 + 0.49 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))
