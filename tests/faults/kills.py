"""SIGKILL at random moments of a run, then resume; the result is that of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.children import CONFIGS, Child, command, ends_well, trial_of
from tests.runs import ROOT, read, same
from threestudio.utils.checkpoint_files import newest_checkpoint, read_checkpoint

STEPS = 24
KEYS = ("state_dict", "optimizer_states", "rng_state", "global_step", "lods_densifier")
KINDS = ("training", "write", "set-up", "training", "any", "write", "training", "test")


@dataclass
class Reference:
    """An undisturbed run: its last checkpoint, and when (in seconds) its parts began."""

    content: dict
    training: float
    test: float
    end: float


def undisturbed(config: str, model, folder: Path) -> Reference:
    """Run it twice, the first time to compile and to fill caches."""
    for name in ("warm", "reference"):
        root = folder / name
        start, times = time.monotonic(), {}
        child = Child(command(config, model, root, STEPS), folder / f"{name}.log", folder)
        trial = trial_of(config, root)
        signs = {"training": trial / "ckpts", "test": trial / "save" / f"it{STEPS}-test"}
        while child.running():
            for part, path in signs.items():
                if part not in times and path.exists():
                    times[part] = time.monotonic() - start
            time.sleep(0.002)
        times["end"] = time.monotonic() - start
        problem = ends_well(child, may_fail=False)
        if problem:
            raise RuntimeError(f"the undisturbed run of {config} failed: {problem}")
    return Reference(read(trial / "ckpts" / "last.ckpt"), **times)


def _sign(kind: str, trial: Path, rng: random.Random) -> "Path | None":
    """What has to be there before the kill: for the training, the checkpoint of a random step."""
    if kind == "test":
        return trial / "save" / f"it{STEPS}-test"
    if kind in ("training", "write"):
        return trial / "ckpts" / f"epoch=0-step={2 * rng.randint(1, STEPS // 2 - 1)}.ckpt"
    return None


def _delay(kind: str, reference: Reference, rng: random.Random) -> float:
    step = (reference.test - reference.training) / STEPS
    longest = {
        "any": reference.end,
        "set-up": reference.training,
        "training": 4 * step,
        "write": 2 * step,
        "test": reference.end - reference.test,
    }[kind]
    return rng.uniform(0, longest)


def _kill(child: Child, kind: str, reference: Reference, trial: Path, rng: random.Random):
    """Kill the child: a random time after the sign of its kind; with "write" then as soon as a
    checkpoint is being written. Yields while it waits."""
    sign, delay = _sign(kind, trial, rng), _delay(kind, reference, rng)
    while child.running() and sign is not None and not sign.exists():
        yield
    start = time.monotonic()
    while child.running() and time.monotonic() - start < delay:
        yield
    if kind == "write":
        until = time.monotonic() + 2
        while child.running() and time.monotonic() < until:
            try:
                if any(name.endswith(".tmp") for name in os.listdir(trial / "ckpts")):
                    time.sleep(rng.uniform(0, 0.003))
                    break
            except FileNotFoundError:
                pass
            yield
    child.kill()


def killed_and_resumed(
    number: int, config: str, model, folder: Path, reference: Reference, rng: random.Random
) -> Iterator:
    """One trial: yields None while it waits, and in the end what is wrong, or ""."""
    root, log = folder / f"run{number}", folder / f"run{number}.log"
    trial, kind = trial_of(config, root), KINDS[number % len(KINDS)]
    kills, wanted = 0, 2 if rng.random() < 0.3 else 1
    while kills < wanted:
        found = newest_checkpoint(trial) if trial.exists() else None
        resume = [f"resume={trial}"] if found else []
        if not found:  # what is left of it is in the way of a new run of its name
            shutil.rmtree(root, ignore_errors=True)
        child = Child(command(config, model, root, STEPS, "--train", *resume), log, folder)
        yield from _kill(child, kind, reference, trial, rng)
        if child.status == -signal.SIGKILL:
            kills += 1
        elif child.status == 0:  # it was quicker than the reference: another time, earlier
            kind = rng.choice(("set-up", "test"))
        else:
            yield f"{config}: {ends_well(child)}"
            return
        last = trial / "ckpts" / "last.ckpt"
        if last.exists():
            read_checkpoint(last)  # raises if it is not whole
        if found and newest_checkpoint(trial)[1] < found[1]:
            yield f"{config}: the kill has cost checkpoints of before"
            return
    resume = [f"resume={trial}"] if trial.exists() and newest_checkpoint(trial) else []
    if not resume:
        shutil.rmtree(root, ignore_errors=True)
    child = Child(command(config, model, root, STEPS, "--train", *resume), log, folder)
    while child.running():
        yield
    problem = ends_well(child, may_fail=False)
    if not problem:
        content = read(trial / "ckpts" / "last.ckpt")
        try:
            for key in KEYS:
                if key in reference.content:
                    same(content[key], reference.content[key], key)
        except AssertionError as error:
            problem = f"{config}, killed in '{kind}': not the undisturbed run's {error}"
        if list(trial.rglob("*.tmp*")):
            problem = f"{config}: temporary files are left"
    yield problem


def kills(n: int, model, folder: Path, seed: int, jobs: int = 2) -> Iterator[str]:
    """`n` trials over all configs, `jobs` at a time."""
    rng = random.Random(seed)
    references = {}
    for config in CONFIGS:
        (folder / config).mkdir(parents=True)
        references[config] = undisturbed(config, model, folder / config)
    waiting = []
    for i in range(n):
        config = list(CONFIGS)[i % len(CONFIGS)]
        arguments = (model, folder / config, references[config], random.Random(rng.random()))
        waiting.append(killed_and_resumed(i, config, *arguments))
    active: list = []
    while waiting or active:
        while waiting and len(active) < jobs:
            active.append(waiting.pop(0))
        for trial in list(active):
            result = next(trial)
            if result is not None:
                active.remove(trial)
                yield result
        time.sleep(0.0005)


def cold_kills(n: int, model, folder: Path, seed: int) -> Iterator[str]:
    """`n` times a process of its own, killed while it imports, loads or trains."""
    rng, folder = random.Random(seed), folder / "cold"
    folder.mkdir(parents=True)
    for i in range(n):
        root = folder / f"run{i}"
        argv = command("gs-embedding", model, root, STEPS)
        with open(folder / f"run{i}.log", "w") as log:
            launch = [sys.executable, str(ROOT / "launch.py"), *argv]
            victim = subprocess.Popen(launch, cwd=folder, stdout=log, stderr=log)
            try:
                victim.wait(rng.uniform(0.1, 8.0))
            except subprocess.TimeoutExpired:
                victim.kill()
                victim.wait()
        trial = trial_of("gs-embedding", root)
        resume = [f"resume={trial}"] if trial.exists() and newest_checkpoint(trial) else []
        yield ends_well(Child([*argv, *resume], folder / f"run{i}.log", folder), may_fail=False)
