"""The world of random shapes: the truth of a prompt are renders of shapes that it describes."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

import threestudio
from evaluation import metrics
from pocket.shapes import truth
from pocket.shapes.data import asked
from pocket.shapes.judge import load as load_judge
from pocket.shapes.judge import verdict
from pocket.shapes.scenes import COLOR_NAMES, KIND_NAMES
from pocket.shapes.truth import Orbit, Pictures
from threestudio.utils.misc import get_device


class Shapes:
    """See :class:`evaluation.worlds.World`."""

    metrics: tuple[str, ...] = (
        "object_accuracy",
        "color_accuracy",
        "frechet",
        "janus_rate",
        "silhouette_iou",
    )
    side = 64
    views: int | None = None

    def ready(self) -> None:
        """It is drawn when it is needed."""

    def labels(self, prompt: str) -> dict[str, str]:
        kind, color = asked(prompt)
        return {"kind": KIND_NAMES[kind], "color": COLOR_NAMES[color] if color >= 0 else ""}

    def cameras(self, count: int) -> None:
        return None

    @torch.no_grad()
    def look(self, system: Any, data: Any, views: int) -> Pictures:
        """The first test views of a trained system, on the CPU."""
        data.setup("test")
        system.to(get_device()).eval()
        system.do_update_step(system.true_current_epoch, system.true_global_step)
        rgb, opacity, azimuth = [], [], []
        for batch in data.test_dataloader():
            on_device = {
                k: v.to(get_device()) if isinstance(v, torch.Tensor) else v
                for k, v in batch.items()
            }
            out = system(on_device)
            rgb += out["comp_rgb"].float().clamp(0, 1).permute(0, 3, 1, 2).cpu()
            opacity += out["opacity"][..., 0].float().cpu()
            azimuth += batch["azimuth"].tolist()
            if len(rgb) >= views:
                break
        stacked = torch.stack(rgb[:views]), torch.stack(opacity[:views])
        return Pictures(*stacked, np.array(azimuth[:views]))

    def example(self, prompt: str, cfg: Any, seed: int, count: int) -> Pictures:
        return truth.example(*asked(prompt), orbit_of(cfg, count), seed, count)

    def score(self, prompt: str, cfg: Any, made: Pictures, true: bool) -> dict[str, float]:
        kind, color = asked(prompt)
        reference = truth.reference(kind, color, orbit_of(cfg, len(made.rgb)))
        said = verdict(load_judge(), small(made.rgb))
        scores = metrics.judged(said, kind, color, made.azimuth, reference.features)
        if made.opacity is not None and reference.masks is not None:
            mask = small(made.opacity[:, None])[:, 0] > 0.5
            scores["silhouette_iou"] = metrics.silhouette_iou(mask.numpy(), reference.masks)
        return scores


def orbit_of(cfg: Any, views: int) -> Orbit | None:
    """The test cameras of a config; None for latents."""
    if cfg is None:
        return None
    data = threestudio.find(cfg.data_type)(cfg.data).cfg
    return Orbit(data.eval_elevation_deg, data.eval_camera_distance, data.eval_fovy_deg, views)


def small(images: Float[torch.Tensor, "V C H W"]) -> Float[torch.Tensor, "V C 64 64"]:
    return F.interpolate(images, (Shapes.side, Shapes.side), mode="area")
