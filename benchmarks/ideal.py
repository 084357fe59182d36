"""What the 3D side alone can do: objects distilled from the ideal denoiser, against the truth.

``python benchmarks/ideal.py`` trains objects of ``pocket/ideal`` with ``configs/ideal.yaml`` (or
``--config lods-ngp-embedding ideal-ngp``), looks at them from the 24 cameras of ``pocket/truth``,
appends a row an object to ``benchmarks/results/ideal.csv`` and draws a sheet: truth, run, and run
over grey and over black. ``--name`` says in the table what was tried, ``key=value`` after ``--``
how.
"""

import argparse
import csv
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from timing import ROOT, commit, write_table

RESULTS = ROOT / "benchmarks/results/ideal.csv"
OBJECTS = ("hamburger", "teddy bear", "cactus", "fire hydrant")
SHEET_VIEWS = (0, 4, 9, 15)  # of the 24
BACKGROUNDS = {"white": 1.0, "grey": 0.5, "black": 0.0}


class Clock(pl.Callback):
    """Seconds of the training, by the wall and of this process's cores, and what a step counts."""

    def on_train_start(self, trainer, system) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer, system) -> None:
        self.seconds = time.perf_counter() - self._start[0]
        self.core_seconds = time.process_time() - self._start[1]


def sheet(rows: list[tuple[torch.Tensor, ...]]) -> Image.Image:
    """A line an object: four true views, and the run's over each background."""
    from evaluation.against_truth import over

    lines = []
    for true, foreground, opacity in rows:
        picked = [true[list(SHEET_VIEWS)]]
        for grey in BACKGROUNDS.values():
            picked.append(over(foreground, opacity, grey)[list(SHEET_VIEWS)])
        lines.append(torch.cat([torch.cat(list(part), dim=1) for part in picked], dim=1))
    return Image.fromarray((torch.cat(lines).numpy() * 255).round().astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", nargs="+", default=list(OBJECTS))
    parser.add_argument("--config", nargs=2, default=["lods-gs-embedding", "ideal"])
    parser.add_argument("--name", default="the overlay as it is")
    parser.add_argument("--ideal", type=Path, default=ROOT / "pocket/ideal")
    parser.add_argument("--truth", type=Path, default=ROOT / "pocket/truth")
    parser.add_argument("--work", type=Path, default=ROOT / "build/ideal")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", help="key=value of a configuration, after a --")
    args = parser.parse_args()
    from threestudio.utils.config import load_config
    from threestudio.utils.extensions import load_extension

    load_extension(ROOT / "custom" / "threestudio-lods")
    from evaluation import training, truth_metrics
    from evaluation.against_truth import over, truth_of, views_of

    drawn = []
    for name in args.objects:
        model = f"system.prompt_processor.pretrained_model_name_or_path={args.ideal}"
        cfg = load_config(
            *(str(ROOT / f"configs/{part}.yaml") for part in args.config),
            cli_args=[f"system.prompt_processor.prompt=a {name}", model, *args.overrides],
        )
        built: tuple[Any, Any] = training.build(cfg, args.work)
        system, data = built
        clock = Clock()
        training.train(
            system, data, [clock], max_steps=cfg.trainer.max_steps, accelerator="cpu", devices=1
        )
        true = truth_of(name, args.truth)
        system.eval()
        system.do_update_step(system.true_current_epoch, system.true_global_step)
        foreground, opacity = views_of(system.renderer, true.cameras, true.rgb.shape[1])
        found = truth_metrics.against(
            over(foreground, opacity), opacity, true.rgb, true.opacity, true.thing.front
        )
        row = {
            "name": args.name,
            "config": args.config[1],
            "object": name,
            "steps": cfg.trainer.max_steps,
            **{key: round(value, 4) for key, value in found.items()},
            "gaussians": getattr(system.geometry, "count", ""),
            "seconds": round(clock.seconds),
            "core_seconds": round(clock.core_seconds),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "threads": torch.get_num_threads(),
            "overrides": " ".join(args.overrides),
            "commit": commit(),
        }
        print({k: v for k, v in row.items() if k not in ("overrides", "commit")}, flush=True)
        rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
        # rows of before a metric was there have nothing in its column
        write_table(args.out, [*({k: old.get(k, "") for k in row} for old in rows), row])
        drawn.append((true.rgb, foreground, opacity))
        args.work.mkdir(parents=True, exist_ok=True)
        sheet(drawn).save(args.work / f"{args.name.replace(' ', '-')}.png")


if __name__ == "__main__":
    sys.exit(main())
