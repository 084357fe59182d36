"""Whole training steps through the shipped configurations, with models of true size.

``python benchmarks/end_to_end.py`` runs each job in a process of its own and writes one row a job
to ``benchmarks/results/end_to_end.csv``. On a CUDA device: lods-gs-embedding at 512 pixels, batch
8, and lods-ngp-lora at 256 pixels, batch 1, as their YAML has it, with a UNet and a VAE of the
shapes of Stable Diffusion 2.1-base and random weights that are made here (time does not depend on
weights, and nothing is downloaded; its text encoder has two layers only, as it works before the
first step). On the CPU: both with pocket-shapes and its overlays, and the overlays with a model
of half the width and latents of 16 pixels. The Gaussians start from a ball of ``--gaussians``.

- ``step_s``: median of whole steps, from the end of one to the end of the next: cameras, rendering,
  guidance, backward, optimizer;
- ``outside_share``: the share of a step outside of the UNet and the VAE's encoder, forward and
  backward, measured in further steps in which their borders wait for the device, so that the former
  are undisturbed;
- ``peak_mib``: of the process; ``peak_device_mib``: of the CUDA allocator; both before these
  further steps, and with the setting up;
- ``gaussians``, ``samples``: drawn; medians over the steps.

Jobs that need what is not here are rows that say so. ``key=value`` after ``--`` are overrides for
all jobs, as of launch.py: ``docs/memory.md`` has examples.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytorch_lightning as pl
import torch
from shapes import SD_UNET, SD_VAE, halved
from timing import ROOT, machine, peak_mib, show, write_table
from training import set_up, train

# job -> (device, configuration, model, its own overrides)
JOBS = {
    "gs full": ("cuda", "lods-gs-embedding", "full", ()),
    "ngp full": ("cuda", "lods-ngp-lora", "full", ()),
    "gs pocket-shapes": ("cpu", "lods-gs-embedding", "pocket-shapes", ()),
    "ngp pocket-shapes": ("cpu", "lods-ngp-lora", "pocket-shapes", ()),
    "gs half": ("cpu", "lods-gs-embedding", "half", ("data.batch_size=1",)),
    "ngp half": ("cpu", "lods-ngp-lora", "half", ("data.batch_size=1",)),
}
MEASURED = (
    *("pixels", "batch", "step_s", "outside_share", "peak_mib", "peak_device_mib"),
    *("gaussians", "samples", "backends"),
)


def make_model(kind: str, folder: Path) -> Path:
    """A diffusers folder: ``full``, ``half`` or ``tiny`` of random weights; ``pocket-shapes``."""
    from tests.tiny_models import WORDS, make_tiny_sd

    if kind == "pocket-shapes":
        return ROOT / "custom/threestudio-lods/lods/models/pocket-shapes"
    if kind == "tiny":
        return make_tiny_sd(folder)
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    from pocket.tokenizer import save_tokenizer

    unet, vae = SD_UNET, SD_VAE
    if kind == "half":
        unet, vae = halved(unet) | {"sample_size": 16}, halved(vae)
    device, dtype = ("cuda", torch.float16) if kind == "full" else ("cpu", torch.float32)
    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, 77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=unet["cross_attention_dim"],
        intermediate_size=4 * unet["cross_attention_dim"],
        num_hidden_layers=2,
        num_attention_heads=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        parts = {
            "unet": diffusers.UNet2DConditionModel(**unet),
            "vae": diffusers.AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(text),
        }
    diffusers.StableDiffusionPipeline(
        **{name: part.to("cpu", dtype) for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


class Clock(pl.Callback):
    """Times ``timed`` steps after ``warm_up``, and in ``profiled`` more what part of them is inside
    of the UNets and the VAE's encoder."""

    def __init__(self, device: str, warm_up: int, timed: int, profiled: int):
        self.device, self.first, self.last = device, warm_up, warm_up + timed
        self.steps = self.last + profiled
        self.ends, self.shares, self.inside, self.begin = [], [], 0.0, None
        self.gaussians, self.samples, self.memory, self.batch = [], [], {}, ()

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(self, *_) -> None:
        self.leave()
        self.begin = self.now()

    def leave(self, *_) -> None:
        if self.begin is not None:
            self.inside += self.now() - self.begin
        self.begin = None

    def watch(self, guidance) -> None:
        """Marks the borders. Backward enters a network with the gradient of its output. It leaves
        the VAE with that of its input, and the UNet, which may end in what is learnt, with the
        next border: nothing but a few operations on latents lies between."""

        def after_unet(module, args, output):
            self.leave()
            sample = output[0] if isinstance(output, tuple) else output.sample
            if sample.requires_grad:
                sample.register_hook(self.enter)

        def before_vae(module, args):
            if args[0].requires_grad:
                args[0].register_hook(self.leave)
            self.enter()

        def after_vae(module, args, output):
            self.leave()
            if output.requires_grad:
                output.register_hook(self.enter)

        for model in guidance.models():
            model.unet.register_forward_pre_hook(self.enter)
            model.unet.register_forward_hook(after_unet)
        guidance.model.vae.encoder.register_forward_pre_hook(before_vae)
        guidance.model.vae.encoder.register_forward_hook(after_vae)

    def on_fit_start(self, trainer, system):
        def count(module, args, out):
            if "ray_indices" in out:
                self.samples.append(len(out["ray_indices"]))
            if hasattr(system.geometry, "count"):
                self.gaussians.append(system.geometry.count)
            self.batch = tuple(out["comp_rgb"].shape[:2])

        system.renderer.register_forward_hook(count)

    def on_after_backward(self, *_):
        self.leave()

    def on_train_batch_end(self, trainer, system, *_):
        self.leave()
        self.ends.append(self.now())
        if len(self.ends) > self.last:
            self.shares.append(1 - self.inside / (self.ends[-1] - self.ends[-2]))
        self.inside = 0.0
        if len(self.ends) == self.last:
            self.memory = {"peak_mib": peak_mib(), "peak_device_mib": ""}
            if self.device == "cuda":
                self.memory["peak_device_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
            self.watch(system.guidance)
            self.ends[-1] = self.now()

    def row(self) -> dict:
        ends = self.ends[self.first - 1 : self.last]
        batch, pixels = self.batch
        return self.memory | {
            "pixels": pixels,
            "batch": batch,
            "step_s": round(statistics.median(b - a for a, b in itertools.pairwise(ends)), 4),
            "outside_share": round(statistics.median(self.shares), 4),
            "gaussians": statistics.median(self.gaussians) if self.gaussians else "",
            "samples": statistics.median(self.samples) if self.samples else "",
        }


def one_job(args, job: str) -> dict:
    """Take the steps in this process."""
    import threestudio

    device, config, model, own = JOBS[job]
    device = "cpu" if args.quick else device
    overrides = [
        f"system.prompt_processor.pretrained_model_name_or_path={args.model}",
        *("system.prompt_processor.use_cache=false", "system.prompt_processor.spawn=false"),
    ]
    if model == "half":
        overrides += ["data.width=128", "data.height=128"]
    if args.quick:
        overrides += ["data.width=16", "data.height=16", "trainer.precision=32"]
    if config.startswith("lods-gs") and (model == "full" or args.quick):
        points = 100 if args.quick else args.gaussians
        overrides += ["system.geometry.init_type=ball", f"system.geometry.ball.n_points={points}"]
    lines, info = [], threestudio.info
    threestudio.info = lambda line: (lines.append(line), info(line))
    clock = Clock(device, args.warm_up, args.steps, args.profiled)
    cfg, system, data = set_up(
        config, model != "full", [*overrides, *own, *args.overrides], args.work
    )
    train(system, data, device, clock.steps, clock, cfg.trainer.precision)
    kinds = ("Gaussian rasteriser: ", "Ray marching: ", "hash grid: ")
    chosen = [line.split(" (")[0] for line in lines if line.startswith(kinds)]
    return clock.row() | {"backends": "; ".join(dict.fromkeys(chosen))}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profiled", type=int, default=5)
    parser.add_argument("--gaussians", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="tiny models on the CPU, 2 steps")
    parser.add_argument("--out", type=Path, help="the table (of --quick: build/end_to_end.csv)")
    parser.add_argument("--work", type=Path, default=ROOT / "build/end_to_end")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # of a process of its own
    parser.add_argument("overrides", nargs="*", help="key=value for launch.py, after a --")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    result = args.work / "result.json"
    if args.quick:
        args.warm_up, args.steps, args.profiled = 1, 2, 2
    if min(args.warm_up, args.steps, args.profiled) < 1:
        parser.error("--warm-up, --steps and --profiled must be at least 1")
    if args.model:
        result.write_text(json.dumps(one_job(args, args.jobs[0])))
        return
    place = "build/end_to_end.csv" if args.quick else "benchmarks/results/end_to_end.csv"
    out = args.out or ROOT / place
    about = machine() | {name: version(name) for name in ("diffusers", "transformers")}
    about["pytorch_lightning"] = pl.__version__
    rows = []
    for job in args.jobs:
        device, config, model, _ = JOBS[job]
        absent = device == "cuda" and not args.quick and not torch.cuda.is_available()
        row = {"job": job, "config": config, "model": "tiny" if args.quick else model}
        row |= {"steps": args.steps, "overrides": " ".join(args.overrides)}
        row |= {"why_not": "no CUDA device" if absent else ""} | dict.fromkeys(MEASURED, "")
        about["device"] = "cpu" if args.quick else device
        if not absent:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--jobs", job, "--work", str(args.work)]
                command += ["--model", str(make_model(row["model"], Path(folder) / "model"))]
                for name in ("warm_up", "steps", "profiled", "gaussians"):
                    command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
                command += [*["--quick"] * args.quick, "--", *args.overrides]
                hidden = {"CUDA_VISIBLE_DEVICES": ""} if about["device"] == "cpu" else {}
                subprocess.run(command, check=True, cwd=ROOT, env=os.environ | hidden)
            row |= json.loads(result.read_text())
            if about["device"] == "cuda":
                about["device"] = torch.cuda.get_device_name()
        rows.append(row | about)
        show(row, {})
        write_table(out, rows)
    print(out)


if __name__ == "__main__":
    main()
