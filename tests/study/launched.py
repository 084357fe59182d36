"""What a launched run leaves of an object: its config and its checkpoint, without a training."""

from pathlib import Path

import torch
from lods.gaussians import Gaussians
from omegaconf import OmegaConf

PARTS = {
    "geometry": ("lods-gaussians", {"init_type": "ball", "ball": {"n_points": 9}}),
    "material": ("no-material", {"n_output_dims": 0}),
    "background": ("solid-color-background", {"color": [1.0, 1.0, 1.0]}),
    "renderer": ("lods-gaussian-rasterizer", {}),
}


def launched_run(folder: Path, prompt: str, gaussians: Gaussians, backend: str = "auto") -> Path:
    """Write the folder of a run of these Gaussians over white, with no model in sight."""
    system: dict = {"prompt_processor": {"prompt": prompt}}
    for name, (kind, options) in PARTS.items():
        system |= {f"{name}_type": kind, name: dict(options)}
    system["renderer"]["backend"] = backend
    (folder / "configs").mkdir(parents=True)
    parsed = {"system_type": "lods-gs-system", "system": system}
    OmegaConf.save(parsed, folder / "configs/parsed.yaml")
    state = {f"geometry.{k}": v.detach() for k, v in gaussians.gaussians().items()}
    state |= {"background.env_color": torch.ones(3), "renderer.bbox": torch.zeros(2, 3)}
    (folder / "ckpts").mkdir()
    checkpoint = {"state_dict": state, "epoch": 0, "global_step": 7}
    torch.save(checkpoint, folder / "ckpts/last.ckpt")
    return folder
