"""The same training steps on every device and backend that this machine has, compared.

``python benchmarks/steps.py`` takes the first steps of each configuration (with its overlay for
pocket-shapes) in a process of its own for each way to run it, from the same weights, cameras and
random numbers (drawn on the CPU, whatever the device), and writes one row a way to
``benchmarks/results/steps.csv``:

- ``loss_difference``: the largest |loss - loss of the first way| / |loss of the first way| of the
  first ``--compared`` steps (rounding grows from step to step, by the optimizer's division);
- ``step_ms``: the median of the later steps, ``over_first``: its ratio to the first way's;
- ``peak_mib``: of the process; ``peak_device_mib``: of the CUDA allocator.

Ways that need what is not here are rows that say so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
import torch
from text_to_3d import CONFIGS
from timing import ROOT, machine, peak_mib, show, write_table
from torch.overrides import TorchFunctionMode
from training import set_up, train

NGP = "system.renderer.backend={march} system.geometry.pos_encoding_config.backend={grid}"
GS = "system.renderer.backend={}"
# way -> (device, overrides, packages that it needs)
WAYS = {
    "lods-ngp": {
        "cpu kernels": ("cpu", NGP.format(march="cpu", grid="cpu"), ()),
        "cpu torch": ("cpu", NGP.format(march="torch", grid="torch"), ()),
        "cuda torch": ("cuda", NGP.format(march="torch", grid="torch"), ()),
        "cuda nerfacc": ("cuda", NGP.format(march="nerfacc", grid="torch"), ("nerfacc",)),
        "cuda nerfacc tinycudann": (
            "cuda",
            NGP.format(march="nerfacc", grid="tinycudann"),
            ("nerfacc", "tinycudann"),
        ),
    },
    "lods-gs": {
        "cpu kernels": ("cpu", GS.format("cpu"), ()),
        "cpu torch": ("cpu", GS.format("torch"), ()),
        "cuda torch": ("cuda", GS.format("torch"), ()),
        "cuda gsplat": ("cuda", GS.format("gsplat"), ("gsplat",)),
        "cuda gswarp": ("cuda", GS.format("gswarp"), ("gswarp",)),
        "cuda diff-gaussian-rasterization": (
            "cuda",
            GS.format("diff-gaussian-rasterization"),
            ("diff_gaussian_rasterization",),
        ),
    },
}
DRAWS = {torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like}


class DrawOnCPU(TorchFunctionMode):
    """Random numbers come from the CPU's generator and are then moved."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in DRAWS:
            return function(*args, **kwargs)
        if function in (torch.rand_like, torch.randn_like):
            like, device = args[0], kwargs.pop("device", args[0].device)
            return function(torch.empty(like.shape, dtype=like.dtype), **kwargs).to(device)
        device = kwargs.pop("device", None)
        drawn = function(*args, **kwargs)
        return drawn if device is None else drawn.to(device)


def one_way(config: str, way: str, steps: int, folder: Path) -> dict:
    """Take the steps in this process; the first way leaves the weights that all start from."""
    device, overrides, _ = WAYS[config.rsplit("-", 1)[0]][way]
    _, system, data = set_up(config, True, overrides.split(), folder)
    start = folder / f"{config}.pt"
    if not start.exists():
        torch.save(system.state_dict(), start)
    system.load_state_dict(torch.load(start, weights_only=True, map_location="cpu"))
    losses, times = [], []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args):
            self.begin = time.perf_counter()

        def on_train_batch_end(self, trainer, module, outputs, *args):
            losses.append(float(outputs["loss"]))  # waits for the device
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - self.begin)

    torch.manual_seed(1)
    with DrawOnCPU():
        train(system, data, device, steps, Clock())
    on_device = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else ""
    return {"losses": losses, "times": times, "peak_mib": peak_mib(), "peak_device_mib": on_device}


def missing(device: str, packages) -> str:
    """What a way lacks here; empty where it can be run."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return ", ".join(f"no {name}" for name in packages if find_spec(name) is None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compared", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build/steps")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/steps.csv")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.way:
        [config] = args.configs
        result = one_way(config, args.way, args.steps, args.work)
        (args.work / "result.json").write_text(json.dumps(result))
        return
    about, rows = machine(), []
    for config in args.configs:
        (args.work / f"{config}.pt").unlink(missing_ok=True)
        first = None
        for way, (device, _, packages) in WAYS[config.rsplit("-", 1)[0]].items():
            row = {"config": config, "way": way, "steps": args.steps, "why_not": ""}
            row |= dict.fromkeys(
                ("loss_difference", "step_ms", "over_first", "peak_mib", "peak_device_mib"), ""
            )
            row["why_not"] = missing(device, packages)
            if not row["why_not"]:
                command = [sys.executable, __file__, "--way", way, "--configs", config]
                command += ["--steps", str(args.steps), "--work", str(args.work)]
                hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
                subprocess.run(command, check=True, env=os.environ | hidden)
                result = json.loads((args.work / "result.json").read_text())
                step = statistics.median(result["times"][args.compared :])
                first = first or (result["losses"], step)
                pairs = list(zip(first[0], result["losses"]))[: args.compared]
                row["loss_difference"] = f"{max(abs(b - a) / abs(a) for a, b in pairs):.2e}"
                row["step_ms"] = round(step * 1e3, 2)
                row["over_first"] = round(step / first[1], 2)
                row["peak_mib"] = result["peak_mib"]
                row["peak_device_mib"] = result["peak_device_mib"]
            about["device"] = device
            if device == "cuda" and not row["why_not"]:
                about["device"] = torch.cuda.get_device_name()
            rows.append(row | about)
            show(row, {})
            write_table(args.out, rows)
    print(args.out)


if __name__ == "__main__":
    main()
