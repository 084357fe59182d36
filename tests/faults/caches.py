"""Damaged caches of compiled kernels: the results are the same, and poison does not act.

Each trial is a process that has compiled nothing yet, so that it reads the cache: two small
kernels, by way of the host's cache and of the extension's, and now and then a whole run of
``launch.py``. A poisoned entry is a pickle that makes a file when it is loaded.
"""

import os
import pickle
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from lods.gaussians import kernel_cache as library_cache

from tests.faults.checkpoints import truncated
from tests.faults.children import Child, command, ends_well
from threestudio.utils import kernel_cache

CONFIG = "ngp-embedding"
HIDDEN = Path("threestudio-lods", "kernels")


class _Poison:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


def _some(folder: Path, rng: random.Random) -> list[Path]:
    """One entry, the key, or all entries."""
    entries = sorted(folder.glob("*.kernel"))
    return rng.choice(([rng.choice(entries)], [rng.choice(entries)], [folder / "key"], entries))


def _flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _of_files(change: Callable[[bytes, random.Random], bytes]) -> Callable:
    def damage(folder: Path, rng: random.Random, made: Path) -> None:
        for path in _some(folder, rng):
            path.write_bytes(change(path.read_bytes(), rng))

    return damage


def _poisoned(folder: Path, rng: random.Random, made: Path) -> None:
    for path in folder.glob("*.kernel"):
        poison = pickle.dumps(_Poison(made))
        path.write_bytes(path.read_bytes()[: rng.choice((0, 32))] + poison)


def _linked(folder: Path, rng: random.Random, made: Path) -> None:
    for path in _some(folder, rng):
        path.unlink()
        path.symlink_to("/dev/zero")


def _swapped(folder: Path, rng: random.Random, made: Path) -> None:
    first, second = rng.sample(sorted(folder.glob("*.kernel")), 2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _folder_linked(folder: Path, rng: random.Random, made: Path) -> None:
    folder = rng.choice((folder, folder.parent))
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def _open_to_others(folder: Path, rng: random.Random, made: Path) -> None:
    _poisoned(folder, rng, made)
    rng.choice((folder, folder.parent)).chmod(rng.choice((0o777, 0o770, 0o702)))


def _a_file(folder: Path, rng: random.Random, made: Path) -> None:
    folder = rng.choice((folder, folder.parent))
    shutil.rmtree(folder)
    folder.write_text("")


def _full(folder: Path, rng: random.Random, made: Path) -> None:
    """Nothing is there, and no file may grow to a kernel's size: see _before."""
    shutil.rmtree(folder)


# name -> (what is done to the folder, whether the run says so in one line)
DAMAGES = {
    "truncated": (_of_files(truncated), False),
    "bit flipped": (_of_files(_flipped), False),
    "emptied": (_of_files(lambda data, rng: b""), False),
    "poisoned": (_poisoned, False),
    "links to a device": (_linked, False),
    "swapped": (_swapped, False),
    "the folder a link": (_folder_linked, True),
    "open to others": (_open_to_others, True),
    "a file for the folder": (_a_file, True),
    "full disk": (_full, True),
}
TOLD = "compiled kernels are not kept"


def _before(cache: Path, limited: bool) -> Callable[[], None]:
    def before() -> None:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        os.environ.pop("NUMBA_CACHE_DIR", None)
        if limited:  # as a full disk, for files of the size of a kernel
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))

    return before


def _twice(x):
    return 2.0 * x


def _half(x):
    return 0.5 * x


def _kernels() -> int:
    """Call the kernels, as a run does; 0 if the results are right."""
    twice, half = kernel_cache.kernel()(_twice), library_cache.kernel()(_half)
    return int((twice(21.0), half(42.0)) != (42.0, 21.0))


def rows(n: int, model, folder: Path, seed: int) -> Iterator[tuple[str, Iterator[str]]]:
    """Names and trials for the table: `n` of two kernels, and a twenty-fifth as many of whole runs,
    the damages by turns."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    whole = command(CONFIG, model, folder / "outputs", 1)
    runs = max(n // 25, 1)
    works = {"damaged cache, two kernels": (_kernels, n), "damaged cache, a run": (whole, runs)}
    for name, (work, times) in works.items():
        good = folder / f"good{times}"
        first = Child(work, folder / f"{times}.log", folder, _before(good, False))
        problem = ends_well(first, may_fail=False)
        if problem or not list((good / HIDDEN).glob("*.kernel")):
            raise RuntimeError(f"before the damage: {problem or 'there is no cache'}")
        # a run whose own files may not grow ends for that
        damages = [d for d in DAMAGES if work is _kernels or d != "full disk"]
        chosen = [damages[i % len(damages)] for i in range(times)]
        yield name, _trials(work, good, folder, chosen, rng)


def _trials(
    work, good: Path, folder: Path, damages: list[str], rng: random.Random
) -> Iterator[str]:
    cache, made = folder / "cache", folder / "poison-acted"
    for i, name in enumerate(damages):
        damage, told = DAMAGES[name]
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(good, cache)
        damage(cache / HIDDEN, rng, made)
        log = folder / f"{good.name}-{i}.log"
        child = Child(work, log, folder, _before(cache, damage is _full))
        problem = ends_well(child, may_fail=False)
        lines = [line for line in child.output().splitlines() if TOLD in line]
        # the host and the extension each tell it once
        if (not problem and bool(lines) != told) or len(lines) > 2:
            problem = f"{len(lines)} lines say that nothing is kept: {lines[:1]}"
        if made.exists():
            made.unlink()
            problem = "the poison acted"
        yield f"{name}: {problem}" if problem else ""
