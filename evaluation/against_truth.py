"""Distilled objects against the true ones: ``python -m evaluation.against_truth RUN...``.

A run of threestudio whose prompt names an object of the pocket world is looked at from the 24
cameras of ``pocket/truth`` at 128 pixels, over white, and compared with the true views
(:mod:`evaluation.truth_metrics`). A line a run goes to the terminal, and with ``--out`` to a CSV
file. Only the object is loaded, neither model nor prompt.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from jaxtyping import Float

import threestudio
from evaluation import truth_metrics
from evaluation.csvfile import write_rows
from evaluation.machine import ROOT
from evaluation.tool import parser_of
from pocket.world import Object, asked
from threestudio.utils.config import load_config
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension
from threestudio.utils.misc import load_module_weights

TRUTH = ROOT / "pocket" / "truth"
PARSED, CHECKPOINT = Path("configs", "parsed.yaml"), Path("ckpts", "last.ckpt")
PARTS = ("geometry", "material", "background", "renderer")
Images = Float[torch.Tensor, "V H W 3"]


@dataclass(frozen=True)
class TrueViews:
    """The true views of an object in a colour, over white."""

    thing: Object
    cameras: Float[np.ndarray, "V 4"]
    rgb: Images
    opacity: Float[torch.Tensor, "V H W"]


def truth_of(prompt: str, folder: Path = TRUTH) -> TrueViews:
    """Of the object and colour that a prompt names. Raises :class:`UserError`, one line, where it
    names none of the pocket world, or the folder has it not."""
    from lods.models.renders import Renders

    try:
        thing, colour = asked(prompt)
        known = Renders.read(folder)
        found = [t for t in known.objects if (t.name, t.colour) == (thing.name, colour)]
        if not found:
            wanted = f"{colour} {thing.name}" if colour else thing.name
            raise ValueError(f"{folder} has no {wanted}: make the truth anew")
        rgba = torch.from_numpy(known.views(found[0])).float() / 255
    except ValueError as error:
        raise UserError(str(error)) from None
    return TrueViews(thing, found[0].cameras, over(rgba[..., :3], rgba[..., 3]), rgba[..., 3])


def over(rgb: Images, opacity: Float[torch.Tensor, "V H W"], grey: float = 1.0) -> Images:
    """A premultiplied picture over a grey background, within 0..1."""
    return (rgb + (1 - opacity[..., None]) * grey).clamp(0, 1)


def load_run(run: Path):
    """``(cfg, system)`` of the folder of a run: ``system.renderer`` renders its object."""
    if not (run / PARSED).is_file() or not (run / CHECKPOINT).is_file():
        raise UserError(f"{run} is no run: it has no {PARSED} or no {CHECKPOINT}")
    cfg = load_config(str(run / PARSED))
    options = cfg.system
    if "init_type" in options.geometry:  # of Gaussians, which the checkpoint brings
        options.geometry.init_type = "none"
    parts: dict = {}
    for name in PARTS:
        kind = threestudio.find(options[f"{name}_type"])
        parts[name] = kind(options.get(name, {}), **(parts if name == "renderer" else {}))
    state, epoch, step = load_module_weights(str(run / CHECKPOINT), map_location="cpu")
    for name, part in parts.items():
        mine = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        wanted = part.state_dict()  # a renderer may hold the other parts, which have theirs
        if missing := [k for k in wanted if k not in mine and k.split(".")[0] not in PARTS]:
            raise UserError(f"{run / CHECKPOINT} has no {name}.{missing[0]}")
        part.load_state_dict({k: v for k, v in mine.items()}, strict=False)
        part.do_update_step(epoch, step, on_load_weights=True)
        part.eval()
    return cfg, SimpleNamespace(**parts)


@torch.no_grad()
def views_of(
    renderer, cameras: Float[np.ndarray, "V 4"], size: int, device: torch.device | str = "cpu"
) -> tuple[Images, Float[torch.Tensor, "V H W"]]:
    """The foreground, premultiplied, and the opacity from these cameras (elevation, azimuth,
    distance, fovy), on the CPU; ``device`` is the renderer's."""
    from lods.threestudio.data import camera_batch

    rgb, opacity = [], []
    for camera in torch.from_numpy(np.array(cameras, np.float32)):
        asked_for = {"height": size, "width": size, "rays_d": True}
        batch = {k: v.to(device) for k, v in camera_batch(camera[None], asked_for).items()}
        out = renderer(**batch, height=size, width=size)
        rgb.append(out["comp_rgb_fg"][0].float().cpu())
        opacity.append(out["opacity"][0, ..., 0].float().cpu())
    return torch.stack(rgb), torch.stack(opacity)


def measure(renderer, true: TrueViews) -> dict[str, float]:
    """The metrics of what a renderer renders, against an object's true views."""
    rgb, opacity = views_of(renderer, true.cameras, true.rgb.shape[1])
    return truth_metrics.against(
        over(rgb, opacity), opacity, true.rgb, true.opacity, true.thing.front
    )


def cell(value) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def main(argv=None) -> int:
    """Run the command line; returns the exit status: 2 after a mistake."""
    parser = parser_of("against_truth", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--prompt", help="what the runs show, by default their own prompt")
    parser.add_argument("--truth", type=Path, default=TRUTH, help="folder of the true views")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args(argv)
    rows, status = [], 0
    try:
        load_extension(ROOT / "custom" / "threestudio-lods")
        for run in args.runs:
            try:
                cfg, system = load_run(run)
                prompt = args.prompt or cfg.system.prompt_processor.prompt
                found = measure(system.renderer, truth_of(prompt, args.truth))
            except (UserError, ValueError) as error:
                print(f"error: {run}: {error}", file=sys.stderr)
                status = 2
                continue
            rows.append(
                {"run": str(run), "prompt": prompt} | {k: cell(v) for k, v in found.items()}
            )
            print(" ".join(f"{k}={v}" for k, v in rows[-1].items() if v != ""), flush=True)
    finally:
        if args.out and rows:  # what is finished is kept, whatever came after it
            write_rows(args.out, list(rows[0]), rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
