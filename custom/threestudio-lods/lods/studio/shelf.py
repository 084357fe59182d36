"""The folders of runs below one folder, and what the files in them say.

A run of the studio is a folder of ``lods make`` (``request.json``, ``job.json``, the results and
``run/``) with two files more:

    studio.json     what its user wants: {"created", "turn", "attempt", "wish", "quality", "error"}
    process.json    who is at it: {"attempt", "pid", "who", "began"}, by the process of the run

Folders of ``lods make`` and of ``lods train`` are shown too. A name that comes from outside is
looked up among those of the folders there are, and never made a path.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lods import host
from lods.commands.job import RECORD, Request, run_of
from lods.commands.make import REQUEST
from lods.commands.runs import PARSED
from lods.files import whole_file
from lods.models import cards
from lods.studio import processes
from omegaconf import OmegaConf

STUDIO, PROCESS, JOB, LOG = "studio.json", "process.json", "job.json", "log.txt"
MAX_JSON = 1 << 20  # bytes of a file that are read
MAX_RUNS = 2000
CHANGES = "interventions.jsonl"  # of the host: what was changed in the live view
MAX_STEERED = 1000  # characters of a prompt
LOG_END = 6000  # bytes of a log that are shown
WAITING = ("queued", "running", "stopping")  # states of runs that are not over
KINDS = {  # of files that are to be had: their ending, and what a browser is told they are
    "picture": (".png", "image/png"),
    "video": (".mp4", "video/mp4"),
    "ply": (".ply", "application/octet-stream"),
    "splat": (".splat", "application/octet-stream"),
    "glb": (".glb", "model/gltf-binary"),
    "learned": (".safetensors", "application/octet-stream"),
    "preview": (".png", "image/png"),
    "log": (".txt", "text/plain; charset=utf-8"),
    "report": (".html", "text/html; charset=utf-8"),
}
_STEP = re.compile(r"it(\d+)")


@dataclass
class Wish:
    """``studio.json``. ``wish``: "run" or "stop". ``attempt`` counts how often it was asked for,
    ``turn`` is its place in the queue (a time), ``error`` is why it could not be started."""

    created: float
    turn: float
    attempt: int = 1
    wish: str = "run"
    quality: str = ""
    error: str = ""

    @classmethod
    def of(cls, found: Any) -> "Wish":
        """Raises ``ValueError`` for anything but what :meth:`Shelf.write` writes."""
        kinds: dict[str, Any] = {"created": float, "turn": float, "attempt": int}
        kinds |= {"wish": str, "quality": str, "error": str}
        if not isinstance(found, dict) or found.keys() != kinds.keys():
            raise ValueError
        if any(type(found[key]) is not kind for key, kind in kinds.items()):
            raise ValueError
        times = found["turn"], found["created"]
        if found["wish"] not in ("run", "stop") or not all(abs(time) < 1e12 for time in times):
            raise ValueError
        return cls(**found)


@dataclass
class Entry:
    """One run as its folder says it is."""

    name: str
    folder: Path
    kind: str  # "studio", "make" or "train"
    state: str  # one of WAITING, or done, failed, stopped, interrupted, damaged
    request: Request | None = None
    wish: Wish | None = None
    process: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether the process that is said to be at it still is."""
        return bool(self.process) and processes.is_alive(self.process["pid"], self.process["who"])

    @property
    def run(self) -> Path | None:
        """The folder with the checkpoints and pictures of its training."""
        if self.kind == "train":
            return self.folder
        if self.request is None:
            return None
        found = self.folder.glob(f"run/{self.request.key}*")
        inside = [path for path in found if path.is_dir() and not path.is_symlink()]
        return max(inside, key=changed, default=None)

    @property
    def trained(self) -> Path | None:
        """The same, if there is a checkpoint to go on from."""
        if self.kind == "train" or self.request is None:
            return self.folder if (self.folder / "ckpts" / "last.ckpt").is_file() else None
        return run_of(self.request, self.folder)


class Shelf:
    """The runs below the folder ``root``, which is made if it is missing."""

    def __init__(self, root: Path):
        root.mkdir(parents=True, exist_ok=True)
        self.root = Path(os.path.realpath(root))
        self._done: dict[str, tuple[tuple[int, ...], Entry]] = {}  # runs that are not read again

    # --- reading ----------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All runs, the newest first."""
        names = self._names()
        if len(names) > MAX_RUNS:
            names.sort(key=lambda name: changed(self.root / name), reverse=True)
        found = [entry for name in names[:MAX_RUNS] if (entry := self._read(name))]
        return sorted(found, key=created, reverse=True)

    def find(self, name: str) -> Entry | None:
        """The run of this name; None for any other text."""
        return self._read(name) if name in self._names() else None

    def _names(self) -> list[str]:
        with os.scandir(self.root) as folder:
            names = [each.name for each in folder if each.is_dir(follow_symlinks=False)]
        # a name that is not text could be shown nowhere, nor asked for
        return [name for name in names if not name.startswith(".") and _is_text(name)]

    def _read(self, name: str) -> Entry | None:
        folder = self.root / name
        times = tuple(changed(folder / file) for file in (STUDIO, PROCESS, JOB, REQUEST, PARSED))
        known = self._done.get(name)
        if known is not None and known[0] == times:
            return known[1]
        self._done.pop(name, None)
        entry = self._look(name, folder)
        if entry is not None and entry.state == "done":
            self._done[name] = times, entry
        return entry

    def _look(self, name: str, folder: Path) -> Entry | None:
        kinds = {STUDIO: self._of_studio, REQUEST: self._of_make, PARSED: self._of_train}
        for file, read in kinds.items():
            if _is_plain(folder / file):
                try:
                    return read(name, folder)
                except Exception:  # one damaged folder must not hide the others
                    kind = {STUDIO: "studio", REQUEST: "make"}.get(file, "train")
                    return Entry(name, folder, kind, "damaged", error="its files cannot be read")
        return None

    def _of_studio(self, name: str, folder: Path) -> Entry:
        entry = Entry(name, folder, "studio", "damaged", process=_process(folder))
        try:
            entry.wish = Wish.of(_json(folder / STUDIO))
            entry.request = _request(folder)
        except (ValueError, TypeError, OSError, RecursionError):
            lost = STUDIO if entry.wish is None else REQUEST
            entry.error = f"{lost} in its folder cannot be read"
            return entry
        job = _job(folder, entry.request)
        entry.seconds = job["seconds"]
        entry.state, entry.error = _state(entry, entry.wish, job)
        return entry

    def _of_make(self, name: str, folder: Path) -> Entry | None:
        try:
            request = _request(folder)
        except (ValueError, TypeError, RecursionError):
            return Entry(name, folder, "make", "damaged", error=f"{REQUEST} cannot be read")
        job = _job(folder, request)
        states = {"done": "done", "failed": "failed"}
        state = states.get(job["state"], "unfinished")
        return Entry(
            name, folder, "make", state, request, seconds=job["seconds"], error=job["error"]
        )

    def _of_train(self, name: str, folder: Path) -> Entry | None:
        done = next(folder.glob("save/it*-test.mp4"), None) is not None
        entry = Entry(name, folder, "train", "done" if done else "unfinished")
        try:
            entry.request = _request_of_config(folder / PARSED)
        except Exception:  # YAML from anywhere fails in many ways
            entry.state, entry.error = "damaged", f"{PARSED} cannot be read"
        return entry

    def files(self, entry: Entry) -> dict[str, Path]:
        """What there is of the run, by kind (:data:`KINDS`). Nothing that a link leads out of the
        folder to is among it."""
        found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
        places = [entry.folder] if entry.kind != "train" else []
        run = entry.run
        if run is not None and entry.kind == "train":
            found["picture"] += run.glob("save/it*-test-sheet.png")
            found["video"] += run.glob("save/it*-test.mp4")
            places += sorted(run.glob("save/it*-export"), key=step_of)
            found["report"] += [run / "report.html"]
        if run is not None:
            shown = [p for p in run.glob("save/it*.png") if re.fullmatch(r"it\d+-\d+\.png", p.name)]
            found["preview"] += sorted(shown, key=lambda p: (step_of(p), -len(p.name), p.name))
        for place in places:
            found["picture"] += [place / "picture.png"]
            found["log"] += [place / LOG]
            found["report"] += [place / "report.html"]
            found["video"] += place.glob("*.mp4")
            for kind in ("splat", "glb", "learned"):
                found[kind] += sorted(place.glob(f"*{KINDS[kind][0]}"))
            others = ("-points.ply", ".compressed.ply")
            found["ply"] += [p for p in place.glob("*.ply") if not p.name.endswith(others)]
        newest = {kind: [p for p in paths if self._is_inside(p)] for kind, paths in found.items()}
        return {kind: paths[-1] for kind, paths in newest.items() if paths}

    def _is_inside(self, path: Path) -> bool:
        """Whether it is a file, neither a link nor in a folder that one leads out of."""
        return _is_plain(path) and Path(os.path.realpath(path)).is_relative_to(self.root)

    # --- writing ----------------------------------------------------------------------------------

    def create(self, request: Request, quality: str) -> str:
        """Put a new run into the queue; returns its name."""
        words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:48].strip("-")
        turns = (entry.wish.turn for entry in self.entries() if entry.wish)
        first, now = words or "run", time.time()
        turn = max(now, max(turns, default=0.0) + 1e-3)  # also if the clock was set back
        for number in range(1, 100_000):
            name = first if number == 1 else f"{first}-{number}"
            # the folder has its files before it has its name
            partial = self.root / f".new-{secrets.token_hex(8)}"
            if os.path.lexists(self.root / name):
                continue
            partial.mkdir()
            try:
                (partial / REQUEST).write_text(json.dumps(request.plain()))
                (partial / STUDIO).write_text(json.dumps(vars(Wish(now, turn, quality=quality))))
                partial.rename(self.root / name)  # fails where there is a folder with files
                return name
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                if not os.path.lexists(self.root / name):
                    raise
        raise ValueError(f"{self.root} has too many runs of this prompt: remove some")

    def write(self, entry: Entry, wish: Wish) -> None:
        with whole_file(entry.folder / STUDIO) as partial:
            partial.write_text(json.dumps(vars(wish)))

    def remove(self, entry: Entry) -> None:
        """Delete the folder of a run of the studio that is over."""
        gone = self.root / f".gone-{secrets.token_hex(8)}"
        entry.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what a killed server has left half made or half deleted."""
        for path in self.root.iterdir():
            if re.fullmatch(r"\.(new|gone)-[0-9a-f]{16}", path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def created(entry: Entry) -> float:
    """When a run was asked for, in seconds since 1970."""
    if entry.wish is not None:
        return entry.wish.created
    return changed(entry.folder) / 1e9


def _state(entry: Entry, wish: Wish, job: dict[str, Any]) -> tuple[str, str]:
    if job["state"] == "done":
        return "done", ""
    if entry.process.get("attempt") != wish.attempt:  # it was asked for and has not begun
        if wish.error:
            return "failed", wish.error
        return ("queued", "") if wish.wish == "run" else ("stopped", "")
    if entry.is_alive:
        return ("running" if wish.wish == "run" else "stopping"), ""
    if wish.wish == "stop":
        return "stopped", ""
    if job["state"] == "failed":
        return "failed", job["error"]
    return "interrupted", "its process was ended from outside, or the machine was restarted"


def changed(path: Path) -> int:
    """When it was changed, in nanoseconds; 0 if it has gone meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


# --- files ----------------------------------------------------------------------------------------


def _is_plain(path: Path) -> bool:
    """Whether it is a file: no link, no pipe, which would block who reads it."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _is_text(name: str) -> bool:
    """Whether it is Unicode: the bytes of other names are lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_file(path: Path, keep: bool = False) -> BinaryIO:
    """A file to write to, at its end if it is to ``keep`` what it has. Raises ``OSError`` where
    there is something else: a link would lead to another file, and a pipe would block."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    handle = os.open(path, flags, 0o666)
    file = os.fdopen(handle, "ab")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"{path.name} in its folder is no file")
    os.set_blocking(handle, True)
    if not keep:
        os.ftruncate(handle, 0)
    return file


def in_use(folder: Path) -> bool:
    """Whether a program holds one of the locks in the folder of a run: of the run as a whole, of
    its training, of its results."""
    locks = [folder / ".claim", *folder.glob("run/*/.lock"), *folder.glob("run/*/.lock-results")]
    return any(_is_locked(path) for path in locks if _is_plain(path))


def _is_locked(path: Path) -> bool:
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # this disk knows no locks
            pass
    return False


def _json(path: Path) -> Any:
    with path.open("rb") as file:
        return json.loads(file.read(MAX_JSON))


def _request(folder: Path) -> Request:
    try:
        found = Request.of(_json(folder / REQUEST))
    except KeyError:
        raise ValueError from None
    texts = (found.prompt, found.on, found.method, found.model, *found.overrides)
    texts += (found.source, found.source_hash)
    if not all(isinstance(text, str) for text in texts) or type(found.seed) is not int:
        raise ValueError
    if not isinstance(found.gpu, str | None) or not isinstance(found.steps, int | None):
        raise ValueError
    return found


def _job(folder: Path, request: Request) -> dict[str, Any]:
    """``job.json``, as :class:`evaluation.batch.Folders` writes it."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = _json(folder / JOB) if _is_plain(folder / JOB) else {}
        if found["key"] == request.key and found["state"] in ("begun", "done", "failed"):
            seconds = _seconds(found["seconds"])
            return {"state": found["state"], "error": str(found["error"]), "seconds": seconds}
    return {"state": "new", "error": "", "seconds": 0.0}


def _seconds(value: Any) -> float:
    """A job that is done is done, whatever number it says that it took."""
    try:
        seconds = float(value)
    except OverflowError:
        return 0.0
    return seconds if 0 <= seconds < 1e12 else 0.0


def _process(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        found = _json(folder / PROCESS) if _is_plain(folder / PROCESS) else None
        kinds = {"attempt": int, "pid": int, "who": str, "began": float}
        if isinstance(found, dict) and all(type(found.get(k)) is t for k, t in kinds.items()):
            return found if abs(found["began"]) < 1e12 else {}
    return {}


def _config(path: Path) -> dict[str, Any]:
    """The saved config of a run as plain values, with references as they are written: they could
    be to the environment of this machine. Raises an error of some kind for another file."""
    if not _is_plain(path):
        raise ValueError
    yaml = host.module("threestudio.utils.safe_yaml")
    text = yaml.read_limited(path)
    yaml.check_yaml(text)  # aliases of aliases would fill the memory
    found = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    if not isinstance(found, dict):
        raise ValueError
    return {str(key): value for key, value in found.items()}


def _request_of_config(path: Path) -> Request:
    """What a run of ``lods train`` was asked for, as far as a form can say it."""
    config = _config(path)
    system, prompt = config["system"], config["system"]["prompt_processor"]
    model = str(prompt["pretrained_model_name_or_path"])
    return Request(
        prompt=str(prompt["prompt"]),
        on=_representation(str(system.get("geometry_type", ""))),
        method=str(system["guidance_type"]).removesuffix("-guidance"),
        model=cards.shipped_name(model) or model,
        small=True,
        seed=int(config.get("seed", 0)),
    )


def _representation(geometry_type: str) -> str:
    """That of ``lods make`` which a geometry is."""
    if "gaussians" in geometry_type:
        return "gaussians"
    return "mesh" if "mesh" in geometry_type else "nerf"


def steered_to(entry: Entry) -> str:
    """The last prompt that a run was given on its way, from its ``interventions.jsonl``; "" where
    it has the one that it was asked for. Lines that are none are passed over."""
    path = entry.run / CHANGES if entry.run is not None else None
    if path is None or not _is_plain(path):
        return ""
    with path.open("rb") as file:
        lines = file.read(MAX_JSON).splitlines()
    for line in reversed(lines):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            change = json.loads(line)
            if change["what"] == "prompt" and isinstance(change["new"], str):
                asked = entry.request.prompt if entry.request is not None else ""
                return change["new"][:MAX_STEERED] if change["new"] != asked else ""
    return ""


def trained_for(entry: Entry) -> float:
    """The seconds of the last training of a run, from its ``run.json``, of the host; 0 where it
    does not tell them."""
    path = entry.run / RECORD if entry.run is not None else None
    if path is None or not _is_plain(path):
        return 0.0
    with suppress(OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return _seconds(_json(path)["trainings"][-1]["seconds"])
    return 0.0


def step_of(path: Path) -> int:
    """The step in ``it300-0.png`` and ``it300-export``."""
    found = _STEP.match(path.name)
    return int(found[1]) if found else -1


def log_end(path: Path) -> str:
    """The last lines of a log. Of a line that was drawn again and again, the last state."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_END))
        text = file.read(LOG_END).decode("utf-8", errors="replace")
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(lines).strip()


def progress(entry: Entry) -> dict[str, Any]:
    """How far the process of a run is: ``{"stage", "step", "of"}``."""
    run = entry.run
    if run is None:
        return {"stage": "starting", "step": 0, "of": 0}
    with suppress(OSError, ValueError, KeyError, IndexError):
        of, views = _lengths(str(run / PARSED), (run / PARSED).stat().st_mtime_ns)
        if next(run.glob(f"save/it{of}-test.mp4"), None):
            return {"stage": "exporting", "step": 0, "of": 0}
        if (frames := run / "save" / f"it{of}-test").is_dir():
            drawn = sum(1 for _ in frames.glob("*.png"))
            return {"stage": "rendering", "step": min(drawn, views), "of": views}
        return {"stage": "training", "step": _last_step(run), "of": of}
    return {"stage": "starting", "step": 0, "of": 0}


_known_lengths: dict[tuple[str, int], tuple[int, int]] = {}


def _lengths(parsed: str, changed: int) -> tuple[int, int]:
    """Steps and test views, of a file that changes only when a run is begun again."""
    if (parsed, changed) not in _known_lengths:
        if len(_known_lengths) > 100:
            _known_lengths.clear()
        try:
            found = _config(Path(parsed))
            pair = int(found["trainer"]["max_steps"]), int(found["data"]["n_test_views"])
        except Exception:
            raise ValueError from None
        _known_lengths[parsed, changed] = pair
    return _known_lengths[parsed, changed]


def _last_step(run: Path) -> int:
    """The last step in the newest table of losses."""
    tables = [path for path in run.glob("csv_logs/version_*/metrics.csv") if _is_plain(path)]
    tables.sort(key=changed)
    if not tables:
        return 0
    with tables[-1].open("rb") as file:
        column = file.readline(8192).decode().strip().split(",").index("step")
        file.seek(max(0, tables[-1].stat().st_size - 4096))
        rows = file.read(4096).decode(errors="replace").split("\n")[:-1]
    steps = [row.split(",")[column] for row in rows[-5:] if row.count(",") >= column]
    return max((int(step) + 1 for step in steps if step.isdecimal()), default=0)
