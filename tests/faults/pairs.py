"""Two runs that start at the same moment: each has a folder of its own, or one of them is told that
the other is there; whatever ends one of them, the other loses nothing."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from tests.faults.children import Child, ends_well
from tests.faults.toys import contents, fresh, load_toy, together, toy_command
from tests.runs import read, same
from threestudio.utils.errors import UserError

KEYS = ("state_dict", "optimizer_states", "global_step")
KINDS = ("same name", "same second", "one interrupted", "same folder of checkpoints", "resumed")


def _start(argvs: list, cwd: Path) -> list:
    gate = cwd / "gate"
    children = [Child(argv, cwd / f"{i}.log", cwd, together(gate)) for i, argv in enumerate(argvs)]
    time.sleep(0.05)
    gate.touch()
    return children


def _whole(trial: Path, seed: int, expected: dict) -> str:
    """What a finished run of that seed lacks in the folder `trial`."""
    parsed = OmegaConf.load(trial / "configs" / "parsed.yaml")
    if parsed.seed != seed or Path(parsed.exp_root_dir, parsed.name).name != trial.parent.name:
        return f"{trial}: the config of another run"
    if parsed.tag + parsed.timestamp != trial.name:
        return f"{trial}: its config leads to {parsed.tag}{parsed.timestamp}"
    ckpts = parsed.checkpoint.get("dirpath")
    path = (trial.parents[2] / ckpts if ckpts else trial / "ckpts") / "last.ckpt"
    content = read(path)
    try:
        for key in KEYS:
            same(content[key], expected[seed][key], key)
    except AssertionError as error:
        return f"{trial}: not the checkpoint of this run: {error}"
    wanted = ("save/it4-test.json", "cmd.txt", "csv_logs/version_0/metrics.csv", "configs/raw.yaml")
    lacking = [name for name in wanted if not (trial / name).is_file()]
    return f"{trial}: without {', '.join(lacking)}" if lacking else ""


def _pair(kind: str, cwd: Path, expected: dict, rng: random.Random) -> str:
    root = cwd / "outputs" / "toy"
    flags = ["use_timestamp=true"] if kind == "same second" else []
    if kind == "same folder of checkpoints":
        flags = ["checkpoint.dirpath=outputs/shared"]
    if kind == "resumed":
        return _resumed(cwd, root, expected)
    argvs = [toy_command(f"seed={seed}", *flags) for seed in (1, 2)]
    children = _start(argvs, cwd)
    if kind == "one interrupted":
        time.sleep(rng.uniform(0, 0.3))
        if children[1].running():
            os.kill(children[1].pid, rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))
        children[1].wait()
    problems = [ends_well(child, may_fail=False) for child in children]
    if kind == "one interrupted":
        problems.pop()
    if any(problems):
        return next(filter(None, problems))
    trials = {OmegaConf.load(p).seed: p.parents[1] for p in root.glob("*/configs/parsed.yaml")}
    wanted = (1,) if kind == "one interrupted" else (1, 2)
    for seed in wanted:
        if seed not in trials:
            return f"the run of seed {seed} has no folder"
        problem = _whole(trials[seed], seed, expected)
        if problem:
            return problem
    return "a lock is left" if list(cwd.rglob(".lock*")) and kind != "one interrupted" else ""


def _resumed(cwd: Path, root: Path, expected: dict) -> str:
    """Both go on with one run: one does, the other is refused or comes after it has ended."""
    first = Child(toy_command("seed=1", "trainer.max_steps=2"), cwd / "first.log", cwd)
    if problem := ends_well(first, may_fail=False):
        return problem
    argv = toy_command("seed=1", "resume=outputs/toy/p")
    children = _start([argv, argv], cwd)
    problems = [ends_well(child) for child in children]
    if any(problems):
        return next(filter(None, problems))
    refused = [child for child in children if child.status == 2]
    if len(refused) == 2:
        return f"both are refused: {refused[0].output()[-200:]}"
    for child in refused:
        if "is training in outputs/toy/p" not in child.output():
            return f"refused with {child.output()[-200:]!r}"
    if len(list(root.iterdir())) != 1:
        return f"{len(list(root.iterdir()))} folders"
    return _whole(root / "p", 1, expected)


def pairs(n: int, folder: Path, seed: int) -> Iterator[str]:
    """`n` pairs, of all kinds in turn."""
    load_toy()
    rng, expected = random.Random(seed), {}
    for number in (1, 2):
        cwd = fresh(folder / f"alone{number}")
        child = Child(toy_command(f"seed={number}"), cwd / "log", cwd)
        if problem := ends_well(child, may_fail=False):
            raise UserError(f"a run alone: {problem}")
        expected[number] = read(cwd / "outputs/toy/p/ckpts/last.ckpt")
        if not contents(cwd / "outputs"):
            raise UserError("a run alone writes nothing")
    for i in range(n):
        kind = KINDS[i % len(KINDS)]
        problem = _pair(kind, fresh(folder / "pair"), expected, rng)
        yield f"{kind}: {problem}" if problem else ""
