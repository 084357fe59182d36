"""The 2D playground: a few latents are distilled from a prompt, with a learnt prior.

``main("lora")`` and ``main("embedding")`` are the two commands. Nothing here knows of 3D.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import torch
from lods.files import whole_file

POCKET = Path(__file__).resolve().parent / "models" / "pocket"

# Per model and prior: the published settings for Stable Diffusion
# (original implementation of arXiv:2312.04820; but the negative prompt is empty, where it has a new
# token for its LoRA), and what suits the pocket prior.
#   batch      particles in one UNet call
#   drawn      which ones: true, as many as there are in every step, drawn with replacement, as in
#              the original; false, all of them once, so that none rests
#   start      uniform numbers in -1..1 of whose mean a latent starts: 4 in the original, whose
#              particles are 8 times as large as latents and resized bilinearly (deviation 0.289)
#   t_max      max_step_percent, from the first step to the last (linear)
#   samples    draws of (t, noise) per particle for the prior's own loss
_SD = {"prompt": "an astronaut is riding a horse", "lr": 3e-2, "samples": 1}
_SD |= {"batch": 3, "drawn": True, "start": 4}
_POCKET = {"prompt": "a DSLR image of a hamburger", "lr": 3e-2, "samples": 1}
_POCKET |= {"batch": 64, "drawn": False, "start": 1}
SETTINGS = {
    ("stable-diffusion", "lora"): _SD
    | {"steps": 700, "guidance_scale": 1e6, "prior_lr": 1e-5, "t_max": (0.98, 0.98)},
    ("stable-diffusion", "embedding"): _SD
    | {"steps": 1000, "guidance_scale": 100.0, "prior_lr": 1e-4, "t_max": (0.98, 0.98)},
    ("pocket", "lora"): _POCKET
    | {"steps": 300, "guidance_scale": 7.5, "prior_lr": 1e-3, "t_max": (0.98, 0.5)},
    ("pocket", "embedding"): _POCKET
    | {"steps": 300, "guidance_scale": 7.5, "prior_lr": 1e-3, "t_max": (0.98, 0.5)},
}


def _positive(kind, most=1e9):
    def parse(text):
        value = kind(text)
        if not 0 < value <= most:
            raise ValueError
        return value

    limit = "" if math.isinf(most) else f", at most {most:g}"
    parse.__name__ = f"number above 0{limit} ({kind.__name__})"  # argparse names it in its message
    return parse


def parse_arguments(kind: str, argv=None) -> argparse.Namespace:
    """The command line; what is None there gets the default of the chosen model later."""
    parser = argparse.ArgumentParser(
        description=f"Distil images from a prompt with LODS ({kind}). Without arguments: Stable "
        "Diffusion if there is a GPU and the model can be had, else the embedded pocket prior."
    )
    add = parser.add_argument

    def by_model(key: str) -> str:
        pocket, large = (SETTINGS[family, kind][key] for family in ("pocket", "stable-diffusion"))
        return f"(default: {pocket}; for Stable Diffusion {large})"

    add("--prompt", help=f"what to make {by_model('prompt')}")
    unknown = "take a prompt in which the pocket prior knows no object"
    add("--allow-unknown-words", action="store_true", help=unknown)
    add(
        "--model",
        help="sd15, sd21-base, sd21, sdxl, pocket, hub id or diffusers folder "
        "(default: chosen, and said why)",
    )
    add("--steps", type=_positive(int), help=f"optimiser steps {by_model('steps')}")
    scale = f"guidance scale, inf allowed {by_model('guidance_scale')}"
    add("--guidance-scale", type=_positive(float, math.inf), help=scale)
    add("--particles", type=_positive(int, 65536), default=6, help="number of images (default 6)")
    add("--lr", type=_positive(float, 1e6), help=f"learning rate of the particles {by_model('lr')}")
    learnt = f"learning rate of the {kind} {by_model('prior_lr')}"
    add("--prior-lr", type=_positive(float, 1e6), help=learnt)
    add("--every", type=_positive(int), default=50, help="steps between pictures (default 50)")
    add("--output", help=f"folder (default: outputs/2d_lods_{kind}/<prompt>@<time>)")
    add("--seed", type=int, default=1, help="random seed (default 1)")
    add("--gpu", type=int, default=0, help="index of the GPU, -1 for the CPU (default 0)")
    return parser.parse_args(argv)


def choose_model(model, load_model_config, default_model: str):
    """(folder or hub id, "stable-diffusion" or "pocket", why in a few words)."""
    if model == "pocket":
        return str(POCKET), "pocket", "as asked"
    if model is not None:
        pocket = Path(model).resolve() == POCKET
        return model, "pocket" if pocket else "stable-diffusion", "as asked"
    if not torch.cuda.is_available():
        return str(POCKET), "pocket", "there is no CUDA GPU; --model takes any Stable Diffusion"
    try:
        load_model_config(default_model, "unet")
    except ValueError as error:
        return str(POCKET), "pocket", str(error)
    return default_model, "stable-diffusion", "there is a CUDA GPU and the model can be had"


def initial_particles(shape, start: int, device):
    """Latents of this shape, each the mean of ``start`` uniform numbers in -1..1."""
    if start == 1:
        return torch.rand(shape, device=device).mul_(2).sub_(1)
    return torch.rand(*shape, start, device=device).mul_(2).sub_(1).mean(-1)


def optimise(
    guidance,
    prompt_utils,
    particles,
    steps: int,
    lr: float,
    prior_lr: float,
    batch: int,
    drawn: bool = False,
):
    """Generator of one dict of numbers per optimiser step; ``particles`` (N, c, h, w), a leaf
    tensor, and what the guidance learns are updated in place. A step's loss is the mean over all
    particles, or, with ``drawn``, over ceil(N / batch) batches that are drawn with replacement."""
    groups = [{"params": [particles], "lr": lr}]
    learnt = [p for p in guidance.parameters() if p.requires_grad]
    if learnt:
        groups.append({"params": learnt, "lr": prior_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(steps):
        guidance.do_update_step(0, step)
        optimizer.zero_grad()
        numbers: dict = {}
        for part in _drawn_batches(particles, batch) if drawn else particles.split(batch):
            front = torch.zeros(len(part), device=part.device)  # all seen from the front
            out = guidance(
                part.permute(0, 2, 3, 1), prompt_utils, front, front, front, rgb_as_latents=True
            )
            share = 1 / math.ceil(len(particles) / batch) if drawn else len(part) / len(particles)
            losses = {k: v * share for k, v in out.items() if "loss_" in k}
            sum(losses.values()).backward()
            for key, value in losses.items():
                numbers[key] = numbers.get(key, 0.0) + value.detach()
        optimizer.step()
        yield {"step": step + 1} | {k: float(v) for k, v in numbers.items()}


def _drawn_batches(particles, batch: int):
    for _ in range(math.ceil(len(particles) / batch)):
        yield particles[torch.randint(len(particles), (batch,), device=particles.device)]


@torch.no_grad()
def decode(guidance, particles):
    """uint8 pictures (N, H, W, 3) of the particles."""
    images = torch.cat([guidance.denoiser.decode(p) for p in particles.detach().split(4)])
    return (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()


def save_grid(path: Path, images) -> Path:
    """One picture with all images, as many columns as rows or one more."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    height, width = images.shape[1:3]
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (i % columns * width, i // columns * height))
    with whole_file(path) as partial:
        sheet.save(partial)
    return path


def save_results(folder: Path, guidance, particles, kind: str) -> Path:
    """Grid, single pictures, latents and what was learnt; returns the grid's path."""
    from PIL import Image
    from safetensors.torch import save_file

    images = decode(guidance, particles)
    for i, image in enumerate(images):
        with whole_file(folder / f"particle_{i:02d}.png") as partial:
            Image.fromarray(image).save(partial)
    with whole_file(folder / "latents.safetensors") as partial:
        save_file({"latents": particles.detach().cpu().contiguous()}, partial)
    guidance.save_learned(folder / f"{kind}.safetensors")
    return save_grid(folder / "final.png", images)


def default_folder(kind: str, prompt: str) -> Path:
    """outputs/2d_lods_<kind>/<prompt>@<time>, with only harmless characters of the prompt, at most
    120 bytes of them (file systems count bytes, and allow 255)."""
    name = re.sub(r"\W+", "_", prompt)[:80].encode()[:120].decode(errors="ignore")
    name = name.strip("_") or "prompt"
    return Path("outputs") / f"2d_lods_{kind}" / f"{name}@{datetime.now():%Y%m%d-%H%M%S}"


def refuse_unknown(model: str, prompt: str, allowed: bool) -> None:
    """Raise ``ValueError`` for a prompt without any object that the model knows (see
    :mod:`.guidance.vocabulary`), before the model is loaded."""
    from lods.models.cards import local_folder
    from lods.models.vocabulary import Vocabulary

    folder = local_folder(model)
    vocabulary = Vocabulary.read(folder) if folder else None
    if vocabulary is None or allowed or not prompt.strip():  # which the prompt processor refuses
        return
    if refusal := vocabulary.refusal(prompt, "--allow-unknown-words"):
        raise ValueError(refusal)


def new_folder(path: Path, config: str) -> Path:
    """The folder ``path``, or ``path-002`` and so on where another run is or was, with ``config``
    in its ``config.json``; no two runs get the same one."""
    for n in itertools.count(1):
        folder = path if n == 1 else path.with_name(f"{path.name}-{n:03d}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / "config.json", "x", encoding="utf-8") as file:
                file.write(config)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there are more numbers")


def run(kind: str, args: argparse.Namespace) -> Path:
    """The whole job; returns the folder with the results.

    Raises ``ValueError`` for bad input, and ``KeyboardInterrupt`` after it has saved what there is.
    """
    # The libraries are heavy, so that bad flags and --help answer before they load.
    from lods.models.cards import resolve
    from lods.models.unet import DEFAULT_MODEL, load_model_config
    from tqdm import tqdm

    import threestudio

    from . import guidance as registers_the_priors  # noqa: F401

    def look_for(name, part):
        found = resolve(name)
        return load_model_config(found.path, part, found.revision)

    model, family, why = choose_model(args.model, look_for, DEFAULT_MODEL)
    defaults = SETTINGS[family, kind]
    settings = {
        key: defaults[key] if getattr(args, key) is None else getattr(args, key)
        for key in ("prompt", "steps", "guidance_scale", "lr", "prior_lr")
    }
    print(f"Model: {model} ({why}).", flush=True)
    refuse_unknown(model, settings["prompt"], args.allow_unknown_words)
    torch.manual_seed(args.seed)
    prior = threestudio.find(f"lods-{kind}-guidance")(
        {
            "pretrained_model_name_or_path": model,
            "guidance_scale": settings["guidance_scale"],
            "lora_n_timestamp_samples": defaults["samples"],
            "max_step_percent": _schedule(defaults["t_max"], settings["steps"]),
        }
    )
    with torch.random.fork_rng(devices=[]):  # a text encoder that is made, not cached, may draw
        prompt_utils = threestudio.find("lods-prompt-processor")(
            {
                "pretrained_model_name_or_path": model,
                "prompt": settings["prompt"],
                "allow_unknown_words": args.allow_unknown_words,
            }
        )()

    wanted = Path(args.output) if args.output else default_folder(kind, settings["prompt"])
    config = {**vars(args), **defaults, **settings, "model": model, "why": why, "kind": kind}
    if math.isinf(config["guidance_scale"]):
        config["guidance_scale"] = "inf"  # JSON has no such number
    folder = new_folder(wanted, json.dumps(config, indent=2) + "\n")
    if folder != wanted:
        print(f"{wanted} holds another run: this one goes to {folder}", flush=True)

    size = prior.denoiser.latent_size
    shape = (args.particles, prior.denoiser.latent_channels, size, size)
    particles = initial_particles(shape, defaults["start"], prior.device).requires_grad_()
    loop = optimise(
        prior,
        prompt_utils,
        particles,
        settings["steps"],
        settings["lr"],
        settings["prior_lr"],
        defaults["batch"],
        defaults["drawn"],
    )
    start, done, interrupted = time.monotonic(), 0, None
    with open(folder / "metrics.csv", "w", newline="", buffering=1) as file:
        table = None
        try:
            pause = 0.1 if sys.stderr.isatty() else 10.0  # seconds between lines in a log file
            bar = tqdm(loop, total=settings["steps"], desc=kind, unit="step", mininterval=pause)
            for numbers in bar:
                done = numbers["step"]
                numbers["seconds"] = round(time.monotonic() - start, 3)
                if table is None:
                    table = csv.DictWriter(file, numbers)
                    table.writeheader()
                table.writerow(numbers)
                shown = {k[5:]: f"{v:.3g}" for k, v in numbers.items() if "loss_" in k}
                bar.set_postfix(shown, refresh=False)
                if done % args.every == 0 and done < settings["steps"]:
                    save_grid(folder / f"{done:05d}.png", decode(prior, particles))
        except KeyboardInterrupt as stop:
            interrupted = stop
            print(f"Interrupted after step {done}: saving what there is.", flush=True)
    grid = save_results(folder, prior, particles, kind)
    print(f"Pictures: {grid}\nLearnt {kind}: {folder / (kind + '.safetensors')}", flush=True)
    if interrupted is not None:
        raise interrupted
    return folder


def _schedule(ends, steps: int):
    from omegaconf import OmegaConf

    first, last = ends
    return first if first == last else OmegaConf.create([0, first, last, steps])


def main(kind: str, argv=None) -> int:
    """Entry point of the script for one kind of prior; returns the exit status: 128 + the signal's
    number (130 for Ctrl-C) if one stopped it."""
    for stream in (sys.stdout, sys.stderr):  # a prompt with an accent may be printed in ASCII
        with contextlib.suppress(
            AttributeError, OSError, ValueError
        ):  # closed, or its reader is gone
            stream.reconfigure(errors="backslashreplace")
    args = parse_arguments(kind, argv)
    before = _stop_like_ctrl_c()
    try:
        # Before CUDA starts: this process then sees that GPU only (-1: none).
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(args.gpu)
        run(kind, args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + getattr(stop, "signum", signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _stop_like_ctrl_c() -> dict:
    """Make kill, a closed terminal and a scheduler's warning save what there is, once; a signal
    that is ignored (nohup) stays so. Returns the handlers of before."""

    def stop(signum, frame):
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        interrupt = KeyboardInterrupt()
        interrupt.signum = signum
        raise interrupt

    before: dict = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    return before


def _visible(gpu: int) -> str:
    """CUDA_VISIBLE_DEVICES for the ``gpu``-th of those that are visible now."""
    if gpu < 0:
        return "-1"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(gpu)
    listed = [name for name in visible.split(",") if name.strip()]
    if not listed:  # all are hidden
        return "-1"
    if gpu >= len(listed):
        raise ValueError(
            f"--gpu {gpu}: CUDA_VISIBLE_DEVICES={visible} leaves {len(listed)}, counted from 0"
        )
    return listed[gpu]
