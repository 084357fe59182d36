"""Hostile prompts and point clouds."""

import importlib
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tests.faults.children import Child, command, ends_well
from tests.faults.toys import toy_folder

# --- prompts ------------------------------------------------------------------------------------

PIECES = (
    *("/", "..", "../", "/../../", "\\", "..\\..\\", "~", "~/", "./", "//", "/etc/passwd", "\0"),
    *("\n", "\r\n", "\t", "\x1b[31m", "\x7f", "\u202e", "\ufeff", "\ud800", "😀", "é", "e\u0301"),
    *(
        "-",
        "--train",
        "-rf",
        "${",
        "}",
        "${oc.env:HOME}",
        "${x}",
        "${rmspace:a,b}",
        "$(id)",
        "`id`",
    ),
    *("'", '"', "'''", "{a: 1}", "[1, 2]", "!!python/object:os.system", "&a", "*a", "#", ": ", "="),
    *(
        "CON",
        "NUL",
        "aux.txt",
        "COM1",
        "a.",
        "a ",
        "???",
        "null",
        "true",
        "1e3",
        "",
        " ",
        "%s",
        "{}",
    ),
    *("a car", "a red chair", "x" * 300, "😀" * 100, "LAST", "@", ".ckpt", ";", "|", ">", "*"),
)


def hostile_prompt(rng: random.Random) -> str:
    """Some of the pieces above, or 10,000 of one character."""
    if rng.random() < 0.05:
        return rng.choice("ax/.😀\n-") * 10_000
    return rng.choice(("", " ", "_")).join(rng.choices(PIECES, k=rng.randint(1, 5)))


def _listing(folder: Path) -> set:
    return {str(p) for p in folder.rglob("*")}


def _outside(sandbox: Path, cwd: Path) -> set:
    """Everything in the sandbox but what a run may write to."""
    allowed = tuple(str(cwd / name) for name in ("outputs", ".threestudio_cache"))
    return {path for path in _listing(sandbox) if not path.startswith(allowed)}


def _work(folder: Path) -> Path:
    """A folder to run in, deep in a sandbox, with the toy's config and extension."""
    return toy_folder(folder / "a" / "b" / "c" / "work")


def _prompts(prompts: list, key: str, argv: list, folder: Path) -> Iterator[str]:
    cwd, logs = _work(folder), folder.parent / f"{folder.name}-logs"
    logs.mkdir()
    before = _outside(folder, cwd)
    for i, prompt in enumerate(prompts):
        problem = ends_well(Child([*argv, f"{key}={prompt}"], logs / f"{i}.log", cwd))
        new = _outside(folder, cwd) - before
        if new:
            problem = f"files outside the output folder: {sorted(new)[:3]}"
            before |= new
        yield f"{prompt[:60]!r}: {problem}" if problem else ""


def prompt_rows(n: int, model, folder: Path, seed: int) -> Iterator[tuple[str, Iterator[str]]]:
    """Names and trials for the table."""
    rng = random.Random(seed)
    prompts = [hostile_prompt(rng) for _ in range(n)]
    toy = ["--extensions", "custom", "--config", "toy.yaml", "--train", "trainer.max_steps=1"]
    toy += ["trainer.enable_progress_bar=false"]
    yield "hostile prompt", _prompts(prompts, "system.prompt", toy, folder / "toy")
    for key in ("tag", "name"):
        trials = _prompts(prompts[: n // 3], key, [*toy, "system.prompt=p"], folder / key)
        yield f"hostile {key}", trials
    whole = command("gs-embedding", model, "outputs", 1)
    whole = [a for a in whole if not a.startswith(("system.prompt_processor.prompt=", "tag="))]
    some = prompts[: max(n // 10, 3)]
    trials = _prompts(some, "system.prompt_processor.prompt", whole, folder / "whole")
    yield "hostile prompt, of a whole run", trials


# --- point clouds -------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, repeated or inserted, or a number of the header changed."""
    out = bytearray(data)
    header = data.index(b"end_header")
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out = out[: rng.randrange(len(out))]
    elif kind == 2:
        out[rng.randrange(header)] = rng.randrange(256)
    elif kind == 3:
        number = rng.choice((-1, 0, 1, 2**31, 2**40, 10**18, 10**30))
        text = data[:header].replace(b"element vertex 50", f"element vertex {number}".encode())
        out = bytearray(text + data[header:])
    elif kind == 4:
        at = rng.randrange(len(out))
        out[at:at] = rng.randbytes(rng.randint(1, 64))
    else:
        words = (b"float", b"uchar", b"double", b"list uchar int", b"property", b"element", b"\n")
        old, new = rng.sample(words, 2)
        out = bytearray(data[:header].replace(old, new, rng.randint(1, 3)) + data[header:])
    return bytes(out)


def _tensors(content: dict) -> list:
    return [torch.as_tensor(v) for v in content.values() if not isinstance(v, int)]


def _read_all(paths: list) -> int:
    """Read every file within a gigabyte more than now, and print what is wrong."""
    ply = importlib.import_module("lods.gaussians.ply")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), resource.RLIM_INFINITY))
    for path in paths:
        problem = ""
        try:
            content = ply.read_ply(path)
            if not all(t.isfinite().all() and t.numel() for t in _tensors(content)):
                problem = "values that are not finite, or none"
        except ValueError as error:
            problem = "more than one line" if "\n" in str(error) else ""
        except BaseException as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"RESULT {problem}")
    return 0


def _read(n: int, files: list, folder: Path, rng: random.Random) -> Iterator[str]:
    paths = []
    for i in range(n):
        paths.append(folder / f"{i}.ply")
        paths[-1].write_bytes(mutated(rng.choice(files), rng))
    child = Child(lambda: _read_all(paths), folder / "read.log", folder)
    status = child.wait(timeout=10 + n)
    results = [r[7:].strip() for r in child.output().splitlines() if r.startswith("RESULT")]
    yield from results
    for _ in range(n - len(results)):
        yield f"the reader ended with status {status} after {len(results)} files"


def ply_rows(n: int, model, folder: Path, seed: int) -> Iterator[tuple[str, Iterator[str]]]:
    """Names and trials for the table."""
    folder.mkdir(parents=True)
    rng, points = random.Random(seed), torch.from_numpy(np.random.default_rng(seed).random((50, 3)))
    ply = importlib.import_module("lods.gaussians.ply")
    quats = torch.ones(50, 4)
    ply.write_ply(folder / "g.ply", points, points, quats, points[:, 0], points[:, None].float())
    ply.write_points(folder / "p.ply", points, points)
    files = [(folder / name).read_bytes() for name in ("g.ply", "p.ply")]
    yield "mutated ply, read", _read(n, files, folder, rng)

    def launched() -> Iterator[str]:
        for i in range(max(n // 30, 2)):
            path = folder / f"cli{i}.ply"
            path.write_bytes(mutated(rng.choice(files), rng))
            argv = command("gs-embedding", model, folder / "outputs", 1)
            argv += ["system.geometry.init_type=file", f"system.geometry.file={{path: {path}}}"]
            yield ends_well(Child(argv, path.with_suffix(".log"), folder))

    yield "mutated ply, through the command line", launched()
