"""One run: distil (or draw), look at it from all sides, judge it."""

import base64
import io
import itertools
import math
import os
import platform
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image

import threestudio
from evaluation import metrics
from evaluation.grid import TRUE, Run
from evaluation.machine import ROOT, peak_mib, versions
from evaluation.table import CELL, CURVES, begun, columns_of
from evaluation.training import build, train
from evaluation.worlds import WORLDS
from pocket.shapes.truth import Pictures, to_tensor
from threestudio.run.machine import cpu_name
from threestudio.utils.config import config_to_primitive, load_config, parse_structured
from threestudio.utils.errors import StoppedError, UserError
from threestudio.utils.extensions import load_custom_modules
from threestudio.utils.files import FULL, disk_error
from threestudio.utils.misc import choose_device, get_device
from threestudio.utils.pretrained import load_complete

LATENTS = "latents"  # system_type of the configurations of latents
SHEET = 4  # pictures of a sheet
CURVE = 20  # rows of a curve
WATCHED = ("loss_sds", "prior_loss", "grad_norm")


# --- what a guidance tells ------------------------------------------------------------------------


class Recorder:
    """Losses and gradient norm of each step, as the guidance returns them. One that is no
    ``nn.Module`` cannot be watched: its curves stay empty."""

    def __init__(self):
        self._calls: list[torch.Tensor] = []
        self._steps: list[torch.Tensor] = []

    def watch(self, guidance) -> None:
        if isinstance(guidance, torch.nn.Module):
            guidance.register_forward_hook(self._see)

    def _see(self, module, args, out) -> None:
        own = [v for k, v in out.items() if k.startswith("loss_") and k != "loss_sds"]
        values = (out.get("loss_sds"), sum(own) if own else None, out.get("grad_norm"))
        values = (torch.as_tensor(math.nan if v is None else v).detach().float() for v in values)
        self._calls.append(torch.stack([v.to(get_device()) for v in values]))

    def end_step(self) -> None:
        """A step is over: it is the mean of the calls since the last."""
        if self._calls:
            self._steps.append(torch.stack(self._calls).mean(0))
            self._calls = []

    def steps(self) -> Float[np.ndarray, "T 3"]:
        """WATCHED of each step; NaN for what was not told."""
        if not self._steps:
            return np.zeros((0, len(WATCHED)))
        return torch.stack(self._steps).double().cpu().numpy()


def curve(steps: Float[np.ndarray, "T 3"], rows: int = CURVE) -> list[dict]:
    """Means over ``rows`` windows of steps of (nearly) one length."""
    edges = np.unique(np.linspace(0, len(steps), rows + 1).round().astype(int))
    return [
        {"step": int(end)} | dict(zip(WATCHED, map(cell, steps[start:end].mean(0))))
        for start, end in itertools.pairwise(edges)
    ]


def ends(values: Float[np.ndarray, " T"]) -> tuple[float, float]:
    """Means over the first and the last tenth."""
    tenth = math.ceil(len(values) / 10)
    if not tenth:
        return math.nan, math.nan
    return float(values[:tenth].mean()), float(values[-tenth:].mean())


class Clock(pl.Callback):
    """Times the training and watches the system's guidance."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.seconds = recorder, 0.0

    def on_train_start(self, trainer, system) -> None:
        self.recorder.watch(getattr(system, "guidance", None))
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *_) -> None:
        self.recorder.end_step()

    def on_train_end(self, *_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._begin


# --- representations ------------------------------------------------------------------------------


@dataclass
class Made:
    """What training leaves."""

    pictures: Pictures
    steps: Float[np.ndarray, "T 3"] = field(default_factory=lambda: np.zeros((0, len(WATCHED))))
    seconds: float = math.nan  # of training alone
    peak_mib: float = math.nan  # of the process, or of CUDA's allocator where that was used
    device: str = "cpu"


def load_run(run: Run, folder: Path):
    """The config of a run, as launch.py would load it."""
    cfg = load_config(
        *(str(ROOT / name) for name in run.configs),
        cli_args=[
            f"seed={run.seed}",
            f"exp_root_dir={folder}",
            "use_timestamp=false",
            "tag=run",
            f"system.prompt_processor.prompt={run.prompt}",
            *([f"system.guidance_type={run.guidance_type}"] if run.guidance_type else []),
            *([f"trainer.max_steps={run.steps}"] if run.steps else []),
            *run.overrides,
        ],
    )
    if cfg.system_type != LATENTS:
        cfg.data.n_test_views = run.views
    scale_rates(cfg, run.scene_lr)
    return cfg


def scale_rates(cfg, factor: float) -> None:
    """Multiply the learning rates of all that is optimised but the guidance, schedules included."""
    if factor == 1:
        return
    optimizer = cfg.system.optimizer
    for name, group in optimizer.params.items():
        if name != "guidance":
            group["lr"] = group.get("lr", optimizer.get("args", {}).get("lr", 0.0)) * factor
    for name, knots in cfg.system.get("lr_schedule", {}).items():
        if name != "guidance":
            # [start, value, value, step, value, step, ...]: see threestudio.utils.misc.C
            knots = [0, *knots] if len(knots) == 3 else list(knots)
            values = {1, *range(2, len(knots), 2)}
            cfg.system.lr_schedule[name] = [
                k * factor if i in values else k for i, k in enumerate(knots)
            ]


def device_and_peak() -> tuple[str, float]:
    """The device's name, and the most memory held so far: of CUDA's allocator where CUDA is used,
    else of the process. MiB."""
    if get_device().type == "cuda":
        return torch.cuda.get_device_name(), round(torch.cuda.max_memory_allocated() / 2**20)
    return get_device().type, peak_mib()


def scene(run: Run, cfg, folder: Path) -> Made:
    """Train the system of a config and render its test views."""
    device = choose_device(config_to_primitive(cfg.trainer))
    system, data = build(cfg, folder)
    recorder = Recorder()
    clock = Clock(recorder)
    train(system, data, [clock], **device)
    name, peak = device_and_peak()
    return Made(
        WORLDS[run.world].look(system, data, run.views), recorder.steps(), clock.seconds, peak, name
    )


@dataclass
class LatentsData:
    n_particles: int = 8
    batch_size: int = 64


@dataclass
class LatentsSystem:
    prompt_processor_type: str
    prompt_processor: dict
    guidance_type: str
    guidance: dict
    optimizer: dict


def latents_data(cfg) -> LatentsData:
    return parse_structured(LatentsData, cfg.data, "data of latents")


def latents(run: Run, cfg, folder: Path) -> Made:
    """Distil particles with the loop of the 2D playground."""
    from lods import playground

    data = latents_data(cfg)
    system = parse_structured(LatentsSystem, cfg.system, "system of latents")
    rates = {name: dict(group) for name, group in system.optimizer.get("params", {}).items()}
    if {n: set(g) for n, g in rates.items()} != {"particles": {"lr"}, "guidance": {"lr"}}:
        raise UserError(
            "latents have system.optimizer.params.particles.lr and ...guidance.lr, and "
            f"nothing else: {rates}"
        )
    choose_device(config_to_primitive(cfg.trainer))
    pl.seed_everything(cfg.seed, workers=True)
    guidance = threestudio.find(system.guidance_type)(system.guidance)
    utils = threestudio.find(system.prompt_processor_type)(system.prompt_processor)()
    recorder = Recorder()
    recorder.watch(guidance)
    method = guidance.method

    asked = WORLDS[run.world].cameras(data.n_particles)
    seen = torch.zeros(data.n_particles, 4)  # all from the front
    if asked is not None:
        seen = torch.from_numpy(asked).float()
    # the loop takes the particles in their order, a batch at a time
    parts = itertools.cycle(seen.to(method.model.device).split(data.batch_size))

    def losses_of(part):
        elevation, azimuth, distance, fovy = next(parts).unbind(1)
        more = {} if asked is None else {"fovy": torch.deg2rad(fovy)}
        rows = part.permute(0, 2, 3, 1)
        return guidance(rows, utils, elevation, azimuth, distance, rgb_as_latents=True, **more)

    shape = (data.n_particles, *method.model.latent_shape)
    particles = torch.rand(shape, device=method.model.device).mul_(2).sub_(1).requires_grad_()
    loop = playground.optimise(
        method,
        particles,
        cfg.trainer.max_steps,
        rates["particles"]["lr"],
        rates["guidance"]["lr"],
        data.batch_size,
        losses_of=losses_of,
    )
    start = time.perf_counter()
    for numbers in loop:
        recorder.end_step()
        bad = [k for k, v in numbers.items() if not math.isfinite(v)]
        if bad:
            raise StoppedError(f"{', '.join(bad)} not finite at step {numbers['step']}")
    if not torch.isfinite(particles).all():  # which also waits for a GPU
        raise StoppedError("the particles are not finite at the end")
    seconds = time.perf_counter() - start
    name, peak = device_and_peak()
    azimuth = None if asked is None else asked[:, 1].astype(float)
    decoded = to_tensor(playground.decode(method.model, particles))
    pictures = Pictures(decoded, azimuth=azimuth)
    return Made(pictures, recorder.steps(), seconds, peak, name)


# --- judging --------------------------------------------------------------------------------------


def score(run: Run, cfg, made: Pictures, clip=None) -> dict[str, float]:
    """All metrics that apply; those of the grid's world where the grid says ``judge``, and the CLIP
    score with what ``load_clip`` gives."""
    scores = {}
    if run.judge:
        on = None if cfg.system_type == LATENTS else cfg
        scores = WORLDS[run.world].score(run.prompt, on, made, run.method == TRUE)
    if clip:
        scores["clip_score"] = metrics.clip_score(*clip, made.rgb, run.prompt)
    return scores


def load_clip(name: str):
    """``(CLIPModel, tokenizer)`` of a folder or hub id, from safetensors and without its code."""
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = load_complete(CLIPModel, name, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the CLIP {name!r} cannot be had ({reason}): set clip in the grid to a folder or hub "
            "id of a transformers CLIP, or leave it out"
        ) from None
    return model.to(get_device()).eval(), tokenizer


def sheet(made: Pictures, side: int = 64) -> bytes:
    """A webp of four pictures in a row, ``side`` pixels each: from azimuth 0, 90, 180 and 270, or
    the first four."""
    picks = list(range(min(SHEET, len(made.rgb))))
    if made.azimuth is not None and len(made.rgb) > SHEET:
        gaps = [(made.azimuth - 360 * k / SHEET + 180) % 360 - 180 for k in range(SHEET)]
        picks = [int(np.abs(gap).argmin()) for gap in gaps]
    shown = F.interpolate(made.rgb[picks], (side, side), mode="area")
    pictures = (shown * 255).round().byte().permute(0, 2, 3, 1).numpy()
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(pictures), axis=1)).save(file, "webp", quality=90)
    return file.getvalue()


# --- the run --------------------------------------------------------------------------------------


def cell(value) -> str:
    """A number as it stands in a table; empty for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def reason(error: BaseException) -> str:
    """One line for a table; of an error without a text, where it was raised."""
    text = " ".join(str(error).split())[:300]
    if not text:
        frames = traceback.extract_tb(error.__traceback__)
        text = f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no reason"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def carry_out(run: Run, threads: int, commit: str, folder: Path) -> dict:
    """Do a run in this process: ``{"row", "curves", "sheet"}``, the sheet in base64. What goes
    wrong is the row's ``status``, except a full disk, which says nothing of the run: that raises
    its ``OSError``."""
    row = begun(run, threads, commit)
    about = versions("torch", "diffusers", "peft")
    row |= {"cpu": cpu_name(), "python": platform.python_version(), **about}
    result = {"row": row, "curves": [], "sheet": None}
    try:
        load_custom_modules(ROOT / "custom")
        world = WORLDS[run.world]
        cfg = load_run(run, folder)
        flat = cfg.system_type == LATENTS
        clip = load_clip(run.clip) if run.clip else None  # or it fails after all the work
        if run.method == TRUE:
            count = latents_data(cfg).n_particles if flat else run.views
            made = Made(world.example(run.prompt, None if flat else cfg, run.seed, count))
        else:
            made = (latents if flat else scene)(run, cfg, folder)
        for numbers in curve(made.steps):
            result["curves"].append({k: row[k] for k in CELL} | numbers)
        first, last = ends(made.steps[:, WATCHED.index("prior_loss")])
        row |= {
            "prior_loss_first": cell(first),
            "prior_loss_last": cell(last),
            "seconds": cell(made.seconds),
            "seconds_per_step": cell(made.seconds / run.steps if run.steps else math.nan),
            "peak_mib": cell(made.peak_mib),
            "device": made.device,
        }
        result["sheet"] = base64.b64encode(sheet(made.pictures, world.side)).decode()
        row |= {k: cell(value) for k, value in score(run, cfg, made.pictures, clip).items()}
        row["status"] = "ok"
    except Exception as error:
        if full := full_disk(error):
            raise full from error
        traceback.print_exc()  # for the log
        row["status"], result["curves"] = reason(error), []
    assert set(row) == set(columns_of(run.world)) and all(
        set(r) == set(CURVES) for r in result["curves"]
    )
    return result


def full_disk(error: BaseException) -> OSError | None:
    """The full disk that an error is about, or comes from."""
    found = disk_error(error)
    return found if found is not None and found.errno in FULL else None


def work(argument: dict, folder: Path) -> dict:
    """What the process of a run does (a function of :mod:`evaluation.batch`)."""
    os.chdir(ROOT)
    torch.set_num_threads(argument["threads"])
    return carry_out(Run.of(argument["run"]), argument["threads"], argument["commit"], folder)
