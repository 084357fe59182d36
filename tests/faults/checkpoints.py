"""Checkpoints cut short or with flipped bits: refused in one line, or loaded as they were."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.faults.children import CONFIGS, Child, command, ends_well, trial_of
from tests.host.test_restore import mutated
from tests.runs import read, same
from threestudio.utils.checkpoint_files import read_checkpoint
from threestudio.utils.errors import UserError
from threestudio.utils.misc import load_module_weights


def truncated(data: bytes, rng: random.Random) -> bytes:
    """Without its end: of any length, or of a few bytes."""
    return data[: rng.choice((rng.randrange(len(data)), len(data) - rng.randint(1, 64)))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """With one bit flipped: anywhere, in the first or in the last 4 kB (the archive's index)."""
    out = bytearray(data)
    places = (rng.randrange(len(out)), rng.randrange(4096), len(out) - 1 - rng.randrange(4096))
    out[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _offered(path: Path, expected: dict) -> str:
    """What is wrong with how this process takes the file as ``resume=`` and as ``weights``."""
    for what, load in (
        ("resume", lambda: read_checkpoint(path)),
        ("weights", lambda: {**expected, "state_dict": load_module_weights(path)[0]}),
    ):
        try:
            content = load()
        except UserError as error:
            if "\n" in str(error):
                return f"{what}: more than one line: {error}"
            continue
        except Exception as error:
            return f"{what}: {type(error).__name__}: {error}"
        try:
            same(content, expected)
        except AssertionError as error:
            return f"{what}: other values were loaded, silently: {error}"
    return ""


def _damaged(
    n: int, damage: Callable, data: bytes, expected: dict, folder: Path, rng: random.Random
) -> Iterator[str]:
    path = folder / "damaged.ckpt"
    for _ in range(n):
        path.write_bytes(damage(data, rng))
        yield _offered(path, expected)


def _command_line(
    n: int, data: bytes, model, folder: Path, config: str, rng: random.Random
) -> Iterator[str]:
    """The same through ``launch.py``, for each of the ways to hand a checkpoint over."""
    for i in range(n):
        for damage in (truncated, flipped):
            path = folder / f"cli{i}-{damage.__name__}.ckpt"
            path.write_bytes(damage(data, rng))
            ways = (("--train", f"resume={path}"), ("--test", f"resume={path}"))
            for mode, way in (*ways, ("--train", f"system.weights={path}")):
                log = path.with_suffix(f".{mode}{way[:6]}.log")
                yield ends_well(
                    Child(command(config, model, folder / "again", 2, mode, way), log, folder)
                )


def _malformed(
    n: int, expected: dict, model, folder: Path, config: str, rng: random.Random
) -> Iterator[str]:
    """Whole files in which something is missing or of another kind, through ``launch.py``."""
    for i in range(n):
        path = folder / f"malformed{i}.ckpt"
        where, value, content = mutated(expected, rng)
        torch.save(content, path)
        mode = rng.choice(("--train", "--test", "--export"))
        argv = command(config, model, folder / "again", 3, mode, f"resume={path}")
        problem = ends_well(Child(argv, path.with_suffix(".log"), folder))
        yield f"{mode} {where} {value!r}: {problem}" if problem else ""


def rows(n: int, model, folder: Path, seed: int) -> Iterator[tuple[str, Iterator[str]]]:
    """Names and trials for the table."""
    folder.mkdir(parents=True)
    config, rng = next(iter(CONFIGS)), random.Random(seed)
    child = Child(command(config, model, folder, 2), folder / "run.log", folder)
    problem = ends_well(child, may_fail=False)
    if problem:
        raise RuntimeError(f"the run that writes the checkpoint failed: {problem}")
    path = trial_of(config, folder) / "ckpts" / "last.ckpt"
    data, expected = path.read_bytes(), read(path)
    yield "truncated checkpoint", _damaged(n, truncated, data, expected, folder, rng)
    yield "checkpoint with a flipped bit", _damaged(n, flipped, data, expected, folder, rng)
    some = _malformed(max(n // 5, 2), expected, model, folder, config, rng)
    yield "malformed checkpoint, through the command line", some
    few = _command_line(max(n // 50, 1), data, model, folder, config, rng)
    yield "both, through the command line", few
