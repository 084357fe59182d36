"""The judge: a small classifier that says which object, colour and view a picture shows.

It shares nothing with the model: a residual network on pixels, trained on renders of its own
seeds, blurred, noised and recoloured so that it is not thrown by soft pictures. It is never used
in training the model or in distillation, only to measure them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pocket.shapes.data import VIEWS
from pocket.shapes.scenes import COLOR_NAMES, KIND_NAMES, KINDS
from pocket.tools import say, whole_file
from pocket.training import cosine, save_state

WEIGHTS = Path(__file__).with_name("judge.safetensors")


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return F.relu(x + self.body(x))


class Judge(nn.Module):
    """Pictures (N, 3, H, W) in 0..1, resized to 64 -> logits ``kind`` (N, 20), ``color`` (N, 8),
    ``view`` (N, 4) and the ``features`` (N, 128) before them."""

    def __init__(self, widths=(24, 48, 96, 128)):
        super().__init__()
        layers, last = [], 3
        for width in widths:
            layers += [
                nn.Conv2d(last, width, 3, 2, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            layers.append(Block(width))
            last = width
        self.body = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Linear(last * 16, 128), nn.ReLU())
        self.heads = nn.ModuleDict(
            {
                "kind": nn.Linear(128, len(KIND_NAMES)),
                "color": nn.Linear(128, len(COLOR_NAMES)),
                "view": nn.Linear(128, len(VIEWS)),
            }
        )

    def forward(self, images):
        if images.shape[-1] != 64:
            images = F.interpolate(images, (64, 64), mode="area")
        x = self.body(2 * images - 1)
        features = self.mix(x.flatten(1))
        return {"features": features, **{k: head(features) for k, head in self.heads.items()}}


def load() -> Judge:
    """The trained judge, ready to use on the CPU."""
    from safetensors.torch import load_file

    judge = Judge().eval().requires_grad_(False)
    state = {k: v.float() for k, v in load_file(WEIGHTS).items()}
    missing, unexpected = judge.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # not of use here
    if missing or unexpected:
        raise ValueError(f"{WEIGHTS} is not of this judge: see {(missing + unexpected)[0]!r}")
    return judge


@torch.no_grad()
def verdict(judge: Judge, images: torch.Tensor, batch: int = 200) -> dict[str, np.ndarray]:
    """Best ``kind``, ``color`` and ``view`` of each picture, and the ``features``."""
    parts = [judge(images[i : i + batch]) for i in range(0, len(images), batch)]
    joined = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return {k: (v if k == "features" else v.argmax(1)).numpy() for k, v in joined.items()}


def _augment(x: torch.Tensor, masks: torch.Tensor, rng) -> torch.Tensor:
    """Re-background, soften, noise and tint pictures (0..1), each with some probability."""
    n = len(x)
    ground = rng.uniform(0, 1, (n, 3, 1, 1))
    ground[rng.uniform(size=n) < 0.5] = 1.0
    swap = torch.from_numpy(rng.uniform(size=n) < 0.35)
    masks = torch.where(swap[:, None, None, None], masks, torch.ones(()))
    x = x * masks + torch.from_numpy(ground).float() * (1 - masks)
    # The first half is softened, by two strengths: the order of a batch is random anyway.
    for part in (slice(0, n // 4), slice(n // 4, n // 2)):
        small = int(rng.integers(20, 56))
        soft = F.interpolate(x[part], (small, small), mode=str(rng.choice(("area", "bilinear"))))
        x[part] = F.interpolate(soft, (64, 64), mode="bilinear")
    sigma = torch.from_numpy(rng.choice((0.0, 0.02, 0.05), (n, 1, 1, 1))).float()
    x = x + sigma * torch.from_numpy(rng.standard_normal(x.shape, np.float32))
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (n, 3, 1, 1))).float()
    return (x * gain).clamp(0, 1).contiguous(memory_format=torch.channels_last)


def train(work: Path, steps: int, seed: int = 0, batch: int = 48, peak: float = 3e-3):
    """Train and write WEIGHTS; resumable through ``work/judge_state.pt``."""
    from safetensors.torch import save_file

    from pocket.shapes.data import make

    file, state_file = work / "judge.npz", work / "judge_state.pt"
    if not file.exists():
        images, masks, labels = make(20000, seed=seed + 7001, workers=torch.get_num_threads())
        with whole_file(file) as tmp, tmp.open("wb") as stream:
            np.savez(stream, images=images, masks=masks, labels=labels)
    data = np.load(file)
    images, masks, labels = data["images"], data["masks"], data["labels"].astype(np.int64)
    front = np.array([k.front for k in KINDS])
    torch.manual_seed(seed)
    judge: Any = Judge()
    judge.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=peak, weight_decay=5e-2)
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        judge.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, steps):
        rng = np.random.default_rng((seed, 2, step))
        pick = rng.integers(len(images), size=batch)
        x = torch.from_numpy(images[pick]).permute(0, 3, 1, 2).float() / 255
        x = _augment(x, torch.from_numpy(masks[pick])[:, None].float() / 255, rng)
        kind, color, _, view = torch.from_numpy(labels[pick]).T
        # A kind without a front has no side, front or back, but it does have a top.
        view = torch.where(torch.from_numpy(front)[kind] | (view == 3), view, -1)
        out = judge(x)
        loss = F.cross_entropy(out["kind"], kind, label_smoothing=0.05)
        for name, target in (("color", color), ("view", view)):
            loss = loss + F.cross_entropy(out[name], target, ignore_index=-1, label_smoothing=0.05)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = (out["kind"].argmax(1) == kind).float().mean().item()
            say(f"judge {step + 1}/{steps} loss {loss.item():.3f} kind {right:.2f}")
            save_state(
                state_file,
                model=judge.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )
    weights = {k: v for k, v in judge.state_dict().items() if v.is_floating_point()}
    with whole_file(WEIGHTS) as tmp:
        save_file({k: v.half().contiguous() for k, v in weights.items()}, tmp)
