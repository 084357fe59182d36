"""The files in the folder of a run, read as the data of others that they are."""

import errno
import fcntl
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from lods import host
from lods.commands.job import Request
from lods.commands.make import REQUEST
from lods.models import cards
from omegaconf import OmegaConf

STUDIO, PROCESS, JOB, LOG = "studio.json", "process.json", "job.json", "log.txt"
MAX_JSON = 1 << 20  # bytes of a file that are read


def changed(path: Path) -> int:
    """When it was changed, in nanoseconds; 0 if it has gone meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def is_plain(path: Path) -> bool:
    """Whether it is a file: no link, no pipe, which would block who reads it."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_text(name: str) -> bool:
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
    return any(_is_locked(path) for path in locks if is_plain(path))


def _is_locked(path: Path) -> bool:
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # this disk knows no locks
            pass
    return False


def read_json(path: Path) -> Any:
    with path.open("rb") as file:
        return json.loads(file.read(MAX_JSON))


def request_in(folder: Path) -> Request:
    try:
        found = Request.of(read_json(folder / REQUEST))
    except KeyError:
        raise ValueError from None
    texts = (found.prompt, found.on, found.method, found.model, *found.overrides)
    texts += (found.source, found.source_hash)
    if not all(isinstance(text, str) for text in texts) or type(found.seed) is not int:
        raise ValueError
    if not isinstance(found.gpu, str | None) or not isinstance(found.steps, int | None):
        raise ValueError
    return found


def job_in(folder: Path, request: Request) -> dict[str, Any]:
    """``job.json``, as :class:`evaluation.batch.Folders` writes it."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = read_json(folder / JOB) if is_plain(folder / JOB) else {}
        if found["key"] == request.key and found["state"] in ("begun", "done", "failed"):
            seconds = seconds_of(found["seconds"])
            return {"state": found["state"], "error": str(found["error"]), "seconds": seconds}
    return {"state": "new", "error": "", "seconds": 0.0}


def seconds_of(value: Any) -> float:
    """A job that is done is done, whatever number it says that it took."""
    try:
        seconds = float(value)
    except OverflowError:
        return 0.0
    return seconds if 0 <= seconds < 1e12 else 0.0


def process_in(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        found = read_json(folder / PROCESS) if is_plain(folder / PROCESS) else None
        kinds = {"attempt": int, "pid": int, "who": str, "began": float}
        if isinstance(found, dict) and all(type(found.get(k)) is t for k, t in kinds.items()):
            return found if abs(found["began"]) < 1e12 else {}
    return {}


def config_in(path: Path) -> dict[str, Any]:
    """The saved config of a run as plain values, with references as they are written: they could
    be to the environment of this machine. Raises an error of some kind for another file."""
    if not is_plain(path):
        raise ValueError
    yaml = host.module("threestudio.utils.safe_yaml")
    text = yaml.read_limited(path)
    yaml.check_yaml(text)  # aliases of aliases would fill the memory
    found = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    if not isinstance(found, dict):
        raise ValueError
    return {str(key): value for key, value in found.items()}


def request_of_config(path: Path) -> Request:
    """What a run of ``lods train`` was asked for, as far as a form can say it."""
    config = config_in(path)
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
