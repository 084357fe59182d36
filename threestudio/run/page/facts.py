"""All that a page tells of a run, read from its folder. What is missing or damaged is left out, and
the page says so."""

import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from threestudio.run.drawing import Camera, Splats, Triangles, objects
from threestudio.run.page import pictures, settings
from threestudio.run.page.curves import Curve, read_curves
from threestudio.run.page.files import Folder
from threestudio.run.page.pictures import Picture
from threestudio.run.page.settings import Command, text_of
from threestudio.run.record import read_record
from threestudio.utils.errors import UserError

OBJECTS = (".ply", ".glb", ".obj")  # that are drawn, in this order
MAX_LEARNED = 1 << 22  # bytes of the header of a file of a learned part
LAST = "ckpts/last.ckpt"
GAUSSIANS = ("means", "scales", "quats", "opacities", "sh0")  # in a checkpoint, as gsplat has them


@dataclass
class Learned:
    """The file of a learned part."""

    name: str
    what: str
    numbers: int
    size: int  # bytes
    metadata: dict[str, str]

    @property
    def moved(self) -> str:
        """How far it has moved, in words; "" where the file does not say it."""
        try:
            share = float(self.metadata["moved"])
        except (KeyError, ValueError):
            return ""
        formula = self.metadata.get("moved_is", "")
        return f"{100 * share:.3g} %" + (f" ({formula})" if formula else "")


@dataclass
class Facts:
    """A run. Lists and texts are empty, and parts None, where the folder does not have them."""

    folder: Folder
    settings: dict[str, Any] = field(default_factory=dict)
    command: Command | None = None
    trainings: list[Mapping[str, Any]] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    found: Splats | Triangles | None = None
    object_file: str = ""
    sheet: Picture | None = None
    poster: Picture | None = None
    previews: list[Picture] = field(default_factory=list)
    learned: Learned | None = None
    step: int | None = None  # that the results are of
    files: list[tuple[str, str, int]] = field(default_factory=list)  # what, name, bytes
    left_out: list[str] = field(default_factory=list)
    _drawn: dict[int, Splats | Triangles] = field(default_factory=dict)

    def attempt(self, what: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives. A page of the rest is worth more than none: where it fails, None,
        and the page says that this is left out."""
        try:
            return make()
        except MemoryError:
            reason = "too large"
        except Exception as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
        if f"{what}: {reason}" not in self.left_out:
            self.left_out.append(f"{what}: {reason}")
        return None

    def drawn(self, most: int) -> Splats | Triangles | None:
        """The object, made of at most so many Gaussians or triangles."""
        if self.found is not None and most not in self._drawn:
            self._drawn = {most: objects.fewer(self.found, most)}
        return self._drawn.get(most)

    def setting(self, key: str) -> Any:
        """The value of a dotted key; None where there is none."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def number(self, key: str, otherwise: float) -> float:
        value = self.setting(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            return float(value) if good else otherwise
        except OverflowError:  # of a whole number
            return otherwise

    @property
    def prompt(self) -> str:
        found = self.setting("system.prompt_processor.prompt")
        return found if isinstance(found, str) else ""

    @property
    def name(self) -> str:
        """What the run is called among others."""
        return os.path.basename(os.path.abspath(self.folder.path))

    @property
    def title(self) -> str:
        return self.prompt or self.name

    @property
    def camera(self) -> Camera:
        return Camera(
            self.number("data.eval_camera_distance", 0.0),
            self.number("data.eval_fovy_deg", 40.0),
            self.number("data.eval_elevation_deg", 15.0),
        )

    def short(self) -> list[tuple[str, str]]:
        """What is told of the run beside the object."""
        rows = [(what, _text(self.setting(key))) for what, key in _KEYS.items()]
        rows = [(what, _plain_name(what, text)) for what, text in rows if text]
        trained = self.step if self.step is not None else self.setting("trainer.max_steps")
        if trained is not None:
            rows.append(("steps", f"{trained:,}" if isinstance(trained, int) else _text(trained)))
        if self.found is not None:
            rows.append(("object", self.found.what))
        if took := _total(self.trainings, "seconds"):
            waited = _total([t for t in self.trainings if "paused" in t], "paused")
            rows.append(("training", took + (f", and {waited} paused" if waited else "")))
        if self.trainings:
            last = self.trainings[-1]
            machine = _text(last.get("machine")) or _text(last.get("device"))
            threads = last.get("threads")
            if last.get("device") == "cpu" and isinstance(threads, int):
                machine += f", {threads} thread{'s' * (threads != 1)}"
            begun = _text(self.trainings[0].get("started"))
            rows += [("on", machine), ("begun", re.sub(r"(?<=\d)T(?=\d)", " ", begun))]
        rows.append(("changed on the way", _steering(settings.read_changes(self.folder))))
        return [(what, text) for what, text in rows if text]


MAX_TOLD = 3  # changes that are told beside the object
_KEYS = {
    "negative prompt": "system.prompt_processor.negative_prompt",
    "method": "system.guidance_type",
    "representation": "system.geometry_type",
    "model": "system.guidance.pretrained_model_name_or_path",
    "guidance scale": "system.guidance.guidance_scale",
    "seed": "seed",
}


def _steering(changes: Sequence[Sequence[str]]) -> str:
    """The first of the changes that somebody made while the run was trained, in words."""
    told = [f"{what} to {new} before step {step}" for step, what, _, new in changes[:MAX_TOLD]]
    more = [f"{len(changes) - MAX_TOLD} more"] * (len(changes) > MAX_TOLD)
    return "; ".join([*told, *more])


def _text(value: Any) -> str:
    return "" if value is None or value == "" else text_of(value)


def _plain_name(what: str, text: str) -> str:
    """A type without the word that all of its kind have; of a folder the last part."""
    if what == "model":
        return (
            os.path.basename(text.rstrip("/")) if os.sep in text and text.count("/") > 1 else text
        )
    return text.removesuffix("-guidance") if what == "method" else text


def _total(trainings: Sequence[Mapping[str, Any]], key: str) -> str:
    """The sum of seconds as text; "" where there is none, or one of them is no number."""
    seconds = [training.get(key) for training in trainings]
    numbers = [each for each in seconds if isinstance(each, (int, float))]
    return duration(sum(numbers)) if numbers and len(numbers) == len(seconds) else ""


def duration(seconds: float) -> str:
    """Seconds in words."""
    seconds = max(0.0, min(float(seconds), 1e9))
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.3g} min" if minutes < 90 else f"{minutes / 60:.3g} h"


def size_of(count: int) -> str:
    """Bytes in words."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000
    return f"{count:.3g} GB"


# --- reading --------------------------------------------------------------------------------------


def read_facts(path) -> Facts:
    """The facts of the run in the folder `path`."""
    facts = Facts(Folder(path))
    attempt, folder = facts.attempt, facts.folder
    facts.settings = attempt("settings", lambda: settings.read_settings(folder)) or {}
    if not facts.settings:
        facts.left_out.append(f"settings: {settings.PARSED} cannot be read")
    facts.command = attempt("command", lambda: settings.read_command(folder))
    facts.trainings = read_record(folder.path)
    facts.curves = attempt("curves", lambda: read_curves(folder)) or {}
    attempt("object", lambda: _read_object(facts))
    attempt("views", lambda: _read_sheet(facts))
    attempt("first picture", lambda: _read_poster(facts))
    for step, name in attempt("previews", lambda: pictures.previews(folder)) or []:
        picture = attempt(name, partial(_first_panel, facts, name, 224))
        if picture is not None:
            label = f"step {step:,}"
            facts.previews.append(Picture(picture.data, picture.width, picture.height, label))
    attempt("learned part", lambda: _read_learned(facts))
    if facts.step is None and facts.trainings:
        step = facts.trainings[-1].get("to_step")
        facts.step = step if isinstance(step, int) else None
    attempt("files", lambda: _list_files(facts))
    return facts


def _exports(folder: Folder) -> list[tuple[int, str]]:
    """The folders of exports, the newest first."""
    names = [(re.fullmatch(r"it(\d{1,12})-export", n), n) for n in folder.folders("save")]
    return sorted(((int(m[1]), f"save/{n}") for m, n in names if m), reverse=True)


def _read_object(facts: Facts) -> None:
    reasons = []
    for step, export in _exports(facts.folder):
        names = [n for n in facts.folder.names(export) if Path(n).suffix in OBJECTS]
        names = [n for n in names if not n.endswith(".compressed.ply")]  # of Gaussians, packed
        names.sort(key=lambda n: (OBJECTS.index(Path(n).suffix), n.endswith("-points.ply"), n))
        for name in names:
            try:
                facts.found = objects.read_object(facts.folder / f"{export}/{name}")
            except Exception as error:  # of many kinds: what others have written
                reasons.append(" ".join(str(error).split())[:160] or type(error).__name__)
                continue
            facts.object_file, facts.step = f"{export}/{name}", step
            return
    if facts.folder.has(LAST):
        facts.found, facts.step = _object_of(facts.folder / LAST)
        facts.object_file = LAST if facts.found is not None else ""
    if facts.found is None:
        none = "nothing was exported yet"
        raise ValueError("; ".join(reasons[:2]) or none)


def _object_of(checkpoint: Path) -> tuple[Splats | None, int | None]:
    """The Gaussians of a run that was stopped before its end, and its step."""
    from threestudio.utils.checkpoint_files import read_checkpoint

    try:
        content = read_checkpoint(checkpoint)
    except UserError as error:
        raise ValueError(str(error)) from None
    state, step = content["state_dict"], content["global_step"]
    parts = [state.get(f"geometry.{name}") for name in GAUSSIANS]
    if any(part is None for part in parts):
        return None, step
    means, scales, quats, opacities, sh0 = (part.detach().float().cpu().numpy() for part in parts)
    return objects.splats_of(means, scales, quats, opacities.reshape(-1), sh0[:, 0]), step


def _read_sheet(facts: Facts) -> None:
    found = pictures.newest(facts.folder, r"-test-sheet\.png")
    if found is not None:
        facts.sheet = pictures.embedded(facts.folder / found[1], 1200)


def _ratio(facts: Facts) -> float:
    """Width over height of a picture of the run."""
    width, height = (facts.number(f"data.eval_{side}", 512) for side in ("width", "height"))
    return width / height if height > 0 else 1.0


def _first_panel(facts: Facts, name: str, side: int) -> Picture:
    return pictures.embedded(facts.folder / name, side, 75, _ratio(facts))


def _read_poster(facts: Facts) -> None:
    """What is seen where nothing can be drawn: the front."""
    frames = [(re.fullmatch(r"it(\d{1,12})-test", n), n) for n in facts.folder.folders("save")]
    names = [
        f"save/{n}/0.png"
        for m, n in sorted(frames, key=lambda p: int(p[0][1]) if p[0] else 0, reverse=True)
        if m
    ]
    names += [name for _, name in pictures.previews(facts.folder)[-1:]]
    for name in names:
        if facts.folder.has(name):
            facts.poster = _first_panel(facts, name, 384)
            return


def _read_learned(facts: Facts) -> None:
    for _, export in _exports(facts.folder):
        for file in facts.folder.names(export):
            if file.endswith(".safetensors"):
                facts.learned = learned_of(facts.folder, f"{export}/{file}")
                return


def learned_of(folder: Folder, name: str) -> Learned:
    """What the header of a safetensors file says. Raises ``ValueError`` for another file."""
    size = os.path.getsize(folder / name)
    with open(folder / name, "rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 2 <= length <= min(MAX_LEARNED, size):
            raise ValueError(f"{name} is no safetensors file")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    shapes = {key: tuple(map(int, value["shape"])) for key, value in header.items()}
    numbers = sum(_product(shape) for shape in shapes.values())
    ranks = {shape[0] for key, shape in shapes.items() if re.search(r"(lora_A|down)\.weight$", key)}
    if ranks:
        what = (
            f"a LoRA of rank {'/'.join(map(str, sorted(ranks)))} on {len(shapes) // 2} projections"
        )
    elif len(shapes) == 1:
        ((key, shape),) = shapes.items()
        what = f"{key.replace('_', ' ')}, {' × '.join(map(str, shape))}"
    else:
        what = f"{len(shapes)} tensors"
    return Learned(name, what, numbers, size, {str(k): str(v) for k, v in metadata.items()})


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _list_files(facts: Facts) -> None:
    folder = facts.folder
    wanted: list[tuple[str, str]] = []
    for what, ending in (("video", r"-test\.mp4"), ("contact sheet", r"-test-sheet\.png")):
        found = pictures.newest(folder, ending)
        if found is not None:
            wanted.append((what, found[1]))
    for _, export in _exports(folder)[:1]:
        for name in folder.names(export):
            learned = facts.learned is not None and facts.learned.name == f"{export}/{name}"
            wanted.append(("learned part" if learned else "object", f"{export}/{name}"))
    wanted.append(("checkpoint", LAST))
    wanted.append(("settings", settings.PARSED))
    logs = [n for n in folder.folders("csv_logs") if re.fullmatch(r"version_\d{1,6}", n)]
    wanted += [("log", f"csv_logs/{log}/metrics.csv") for log in logs[-1:]]
    for what, name in wanted:
        if folder.has(name):
            facts.files.append((what, name, os.path.getsize(folder / name)))
