"""The 2D playground: a few latents are distilled from a prompt, with one of the LODS methods.

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
from typing import TYPE_CHECKING, Any, cast

import torch
from lods.cameras import TOLD, Cameras
from lods.edits.settings import CONFIG
from lods.files import told, whole_file
from lods.models.cards import EMBEDDED
from lods.models.vocabulary import OPTION

if TYPE_CHECKING:
    from collections.abc import Callable

    from lods.methods import Method
    from lods.models.base import Model
    from torch import Tensor

# signals that ask a process to stop, beside that of Ctrl-C
STOPPING = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
# Per model and method: the published settings for Stable Diffusion
# (original implementation of arXiv:2312.04820; but the negative prompt is empty, where it has a new
# token for its LoRA), and what suits a model that comes with this package, by the name of its card.
#   batch      particles in one UNet call
#   drawn      which ones: true, as many as there are in every step, drawn with replacement, as in
#              the original; false, all of them once, so that none rests
#   start      uniform numbers in -1..1 of whose mean a latent starts: 4 in the original, whose
#              particles are 8 times as large as latents and resized bilinearly (deviation 0.289)
#   t_max      max_step_percent, from the first step to the last (linear)
#   samples    draws of (t, noise) per particle for the learned part's loss
_SD = {"prompt": "an astronaut is riding a horse", "lr": 3e-2, "samples": 1}
_SD |= {"batch": 3, "drawn": True, "start": 4}
_SHAPES = {"prompt": "a DSLR image of a hamburger", "lr": 3e-2, "samples": 1}
_SHAPES |= {"batch": 64, "drawn": False, "start": 1}
_POCKET = _SHAPES | {"steps": 300, "t_max": (0.98, 0.3)}
SETTINGS = {
    ("stable-diffusion", "lora"): _SD
    | {"steps": 700, "guidance_scale": 1e6, "prior_lr": 1e-5, "t_max": (0.98, 0.98)},
    ("stable-diffusion", "embedding"): _SD
    | {"steps": 1000, "guidance_scale": 100.0, "prior_lr": 1e-4, "t_max": (0.98, 0.98)},
    ("pocket", "lora"): _POCKET | {"guidance_scale": 7.5, "prior_lr": 4e-3},
    ("pocket", "embedding"): _POCKET | {"guidance_scale": 7.5, "prior_lr": 1e-3},
    ("pocket-flow", "lora"): _POCKET | {"guidance_scale": 7.5, "prior_lr": 4e-3},
    ("pocket-flow", "embedding"): _POCKET | {"guidance_scale": 7.5, "prior_lr": 1e-3},
    ("pocket-shapes", "lora"): _SHAPES
    | {"steps": 300, "guidance_scale": 7.5, "prior_lr": 1e-3, "t_max": (0.98, 0.5)},
    ("pocket-shapes", "embedding"): _SHAPES
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


def _angle(most: float):
    def parse(text):
        value = float(text)
        if not -most <= value <= most:
            raise ValueError
        return value

    parse.__name__ = f"number from {-most} to {most} (float)"
    return parse


def parse_arguments(kind: str, argv=None, prog: str | None = None) -> argparse.Namespace:
    """The command line; what is None there gets the default of the chosen model later."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"Distil images from a prompt with LODS ({kind}). Without arguments: Stable "
        "Diffusion if there is a GPU and the model can be had, else the embedded model.",
    )
    add = parser.add_argument

    def by_model(key: str) -> str:
        small, large = (SETTINGS[family, kind][key] for family in (EMBEDDED, "stable-diffusion"))
        return f"(default: {small}; for Stable Diffusion {large})"

    add("--prompt", help=f"what to make {by_model('prompt')}")
    unknown = "take a prompt in which the embedded model knows no object"
    add(OPTION, action="store_true", help=unknown)
    add(
        "--model",
        help=f"sd15, sd21-base, sd21, sdxl, {EMBEDDED}, hub id or diffusers folder "
        "(default: chosen, and said why)",
    )
    add("--steps", type=_positive(int), help=f"optimiser steps {by_model('steps')}")
    scale = f"guidance scale, inf allowed {by_model('guidance_scale')}"
    add("--guidance-scale", type=_positive(float, math.inf), help=scale)
    told = (
        "what the model is told of the side that the pictures show: words in the prompt (default)"
    )
    told += ", the camera itself (tokens), or both; tokens and both need a model with an encoder"
    add("--cameras", choices=TOLD, default=TOLD[0], help=told)
    for name, most, what in (("azimuth", 360, "0 the front, 180 the back"), ("elevation", 90, "")):
        side = f"side that the pictures show, in degrees{', ' * bool(what)}{what} (default 0)"
        add(f"--{name}", type=_angle(most), default=0.0, metavar="DEGREES", help=side)
    add("--particles", type=_positive(int, 65536), default=6, help="number of images (default 6)")
    add("--lr", type=_positive(float, 1e6), help=f"learning rate of the particles {by_model('lr')}")
    learned = f"learning rate of the {kind} {by_model('prior_lr')}"
    add("--prior-lr", type=_positive(float, 1e6), help=learned)
    add("--every", type=_positive(int), default=50, help="steps between pictures (default 50)")
    add("--output", help=f"folder (default: outputs/2d_lods_{kind}/<prompt>@<time>)")
    add("--seed", type=int, default=1, help="random seed (default 1)")
    add("--gpu", type=int, default=0, help="index of the GPU, -1 for the CPU (default 0)")
    return parser.parse_args(argv)


def choose_model(model: str | None) -> tuple[str, str, str]:
    """(folder or hub id, whose SETTINGS suit it, why in a few words): "stable-diffusion", or the
    card of a model that comes with this package."""
    from lods.models import choose
    from lods.models.cards import CARDS, all_cards, canonical

    if model is None:
        name, why = choose()
    else:
        name, why = model, "as asked"
    card = all_cards().get(canonical(name))
    if card is None or card.folder is None:
        return name, "stable-diffusion", why
    return str(CARDS.parent / card.folder) if name == card.name else name, card.name, why


def initial_particles(shape, start: int, device):
    """Latents of this shape, each the mean of ``start`` uniform numbers in -1..1."""
    if start == 1:
        return torch.rand(shape, device=device).mul_(2).sub_(1)
    return torch.rand(*shape, start, device=device).mul_(2).sub_(1).mean(-1)


def camera_at(model: "Model", elevation: float, azimuth: float) -> Cameras:
    """The camera of a picture that shows the object from this side (degrees), as far away and with
    as wide a view as in the middle of what a model with an encoder of cameras was trained with."""
    encoder = getattr(model, "camera_tokens", None)
    distance, fovy = (
        (encoder.config.distance[0], encoder.config.fovy[0]) if encoder else (1.0, 40.0)
    )
    numbers = torch.tensor([elevation, azimuth, distance, fovy], device=model.device)
    elevations, azimuths, distances, fields = numbers[:, None]
    return Cameras(elevations, azimuths, distances, fovy=fields)


def optimise(
    method: "Method",
    particles: "Tensor",
    steps: int,
    lr: float,
    prior_lr: float,
    batch: int,
    drawn: bool = False,
    losses_of: "Callable[[Tensor], dict[str, Any]] | None" = None,
):
    """Generator of one dict of numbers per optimiser step; ``particles`` (N, c, h, w), a leaf
    tensor, and the method's learned part are updated in place. A step's loss is the mean over all
    particles, or, with ``drawn``, over ceil(N / batch) batches that are drawn with replacement.
    ``losses_of``: what gives the losses of some particles by name; by default the method does."""
    groups: list[dict[str, Any]] = [{"params": [particles], "lr": lr}]
    learned = [p for p in method.parameters() if p.requires_grad]
    if learned:
        groups.append({"params": learned, "lr": prior_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(steps):
        method.step(step)
        optimizer.zero_grad()
        numbers: dict[str, Any] = {}
        for part in _drawn_batches(particles, batch) if drawn else particles.split(batch):
            out = method(latents=part).terms if losses_of is None else losses_of(part)
            share = 1 / math.ceil(len(particles) / batch) if drawn else len(part) / len(particles)
            losses = {k: v * share for k, v in out.items() if "loss_" in k}
            cast("Tensor", sum(losses.values())).backward()
            for key, value in losses.items():
                numbers[key] = numbers.get(key, 0.0) + value.detach()
        optimizer.step()
        yield {"step": step + 1} | {k: float(v) for k, v in numbers.items()}


def _drawn_batches(particles, batch: int):
    for _ in range(math.ceil(len(particles) / batch)):
        yield particles[torch.randint(len(particles), (batch,), device=particles.device)]


@torch.no_grad()
def decode(model: "Model", particles):
    """uint8 pictures (N, H, W, 3) of the particles."""
    images = torch.cat([model.decode(p) for p in particles.detach().split(4)])
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


def save_results(folder: Path, method: "Method", particles, kind: str) -> Path:
    """Grid, single pictures, latents and the learned part; returns the grid's path."""
    from PIL import Image
    from safetensors.torch import save_file

    images = decode(method.model, particles)
    for i, image in enumerate(images):
        with whole_file(folder / f"particle_{i:02d}.png") as partial:
            Image.fromarray(image).save(partial)
    with whole_file(folder / "latents.safetensors") as partial:
        save_file({"latents": particles.detach().cpu().contiguous()}, partial)
    method.save(folder / f"{kind}.safetensors")
    return save_grid(folder / "final.png", images)


def default_folder(kind: str, prompt: str) -> Path:
    """outputs/2d_lods_<kind>/<prompt>@<time>, see :func:`dated`."""
    return Path("outputs") / f"2d_lods_{kind}" / dated(prompt)


def dated(prompt: str) -> str:
    """<prompt>@<time>, with only harmless characters of the prompt, at most 120 bytes of them (file
    systems count bytes, and allow 255)."""
    name = re.sub(r"\W+", "_", prompt)[:80].encode()[:120].decode(errors="ignore")
    name = name.strip("_") or "prompt"
    return f"{name}@{datetime.now():%Y%m%d-%H%M%S}"


def new_folder(path: Path, config: str) -> Path:
    """The folder ``path``, or ``path-002`` and so on where another run is or was, with ``config``
    in its ``config.json``; no two runs get the same one. Raises ``ValueError``, one line, as
    :func:`refuse_folder` does."""
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    for n in itertools.count(1):
        folder = path if n == 1 else path.with_name(f"{path.name}-{n:03d}")
        refuse_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / CONFIG, "x", encoding="utf-8") as file:
                file.write(config)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there are more numbers")


def refuse_folder(path: Path) -> None:
    """Raise ``ValueError``, one line, where results in this folder would go over the files of
    somebody, or cannot go: a folder that holds others than a run's, or what is no folder."""
    first = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
    if os.path.lexists(first) and not first.is_dir():
        raise ValueError(f"{first} is no folder: name another one for the results")
    if first != path or os.path.lexists(path / CONFIG):
        return
    others = sorted(each.name for each in path.iterdir() if not each.name.startswith("."))
    if others:
        raise ValueError(
            f"{path} holds {others[0][:60]!r} and no run: results could go over what is there; "
            "name a folder that is new or empty"
        )


def run(kind: str, args: argparse.Namespace) -> Path:
    """The whole job; returns the folder with the results.

    Raises ``ValueError`` for bad input, and ``KeyboardInterrupt`` after it has saved what there is.
    """
    # The libraries are heavy, so that bad flags and --help answer before they load.
    import lods
    from lods.prompts import TextSettings, check_words
    from tqdm import tqdm

    if args.output:
        refuse_folder(Path(args.output))
    model, family, why = choose_model(args.model)
    defaults = SETTINGS[family, kind]
    settings = {
        key: defaults[key] if getattr(args, key) is None else getattr(args, key)
        for key in ("prompt", "steps", "guidance_scale", "lr", "prior_lr")
    }
    print(f"Model: {model} ({why}).", flush=True)
    if settings["prompt"].strip():  # an empty one is refused below
        known = TextSettings(allow_unknown_words=args.allow_unknown_words)
        check_words(model, settings["prompt"], known, OPTION)
    torch.manual_seed(args.seed)
    method = lods.load(
        f"lods-{kind}",
        model,
        settings["prompt"],
        guidance_scale=settings["guidance_scale"],
        lora_n_timestamp_samples=defaults["samples"],
        max_step_percent=_schedule(defaults["t_max"], settings["steps"]),
        allow_unknown_words=True,
        cameras=args.cameras,
    )
    camera = camera_at(method.model, args.elevation, args.azimuth)

    wanted = Path(args.output) if args.output else default_folder(kind, settings["prompt"])
    config = {**vars(args), **defaults, **settings, "model": model, "why": why, "kind": kind}
    if math.isinf(config["guidance_scale"]):
        config["guidance_scale"] = "inf"  # JSON has no such number
    folder = new_folder(wanted, json.dumps(config, indent=2) + "\n")
    if folder != wanted:
        print(f"{wanted} holds another run: this one goes to {folder}", flush=True)

    shape = (args.particles, *method.model.latent_shape)
    particles = initial_particles(shape, defaults["start"], method.model.device).requires_grad_()
    loop = optimise(
        method,
        particles,
        settings["steps"],
        settings["lr"],
        settings["prior_lr"],
        defaults["batch"],
        defaults["drawn"],
        lambda part: method(latents=part, cameras=camera.repeat(len(part))).terms,
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
                    save_grid(folder / f"{done:05d}.png", decode(method.model, particles))
        except KeyboardInterrupt as stop:
            interrupted = stop
            print(f"Interrupted after step {done}: saving what there is.", flush=True)
    grid = save_results(folder, method, particles, kind)
    print(f"Pictures: {grid}\nLearned {kind}: {folder / (kind + '.safetensors')}", flush=True)
    if interrupted is not None:
        raise interrupted
    return folder


def _schedule(ends, steps: int):
    first, last = ends
    return first if first == last else [0, first, last, steps]


def main(kind: str, argv=None, prog: str | None = None) -> int:
    """Entry point of the script for one LODS method; returns the exit status: 128 + the signal's
    number (130 for Ctrl-C) if one stopped it."""
    for stream in (sys.stdout, sys.stderr):  # a prompt with an accent may be printed in ASCII
        with contextlib.suppress(
            AttributeError, OSError, ValueError
        ):  # closed, or its reader is gone
            cast(Any, stream).reconfigure(errors="backslashreplace")
    args = parse_arguments(kind, argv, prog)
    return carry_out(lambda: run(kind, args), args.gpu)


def carry_out(work: "Callable[[], Any]", gpu: int) -> int:
    """Do ``work`` on a GPU (-1: the CPU); returns the exit status: 2, with a line, for what it says
    is wrong, and 128 + the signal's number if one stopped it."""
    before = _stop_like_ctrl_c()
    try:
        # Before CUDA starts: this process then sees that GPU only (-1: none).
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(gpu)
        work()
    except (ValueError, OSError) as error:
        text = told(error) if isinstance(error, OSError) else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
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
        interrupt: Any = KeyboardInterrupt()
        interrupt.signum = signum
        raise interrupt

    before: dict = {}
    if threading.current_thread() is threading.main_thread():
        for name in STOPPING:
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
