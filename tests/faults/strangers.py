"""Checkpoints of strangers with paths to folders and files of the user: none is touched."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.faults.children import Child, ends_well
from tests.faults.toys import contents, fresh, load_toy, toy_command
from tests.runs import read
from tests.safety.test_own_folder import poisoned, victims
from threestudio.utils.errors import UserError

KEYS = ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath")
MONITOR = ["checkpoint.monitor=train/loss_toy", "checkpoint.save_top_k=2"]
LAST = Path("outputs/toy/p/ckpts/last.ckpt")


def _strange(content: dict, path: str, monitor: bool, rng: random.Random) -> dict:
    """A checkpoint that names `path` in some or all of the places that can hold a path."""
    kind = rng.randrange(4)
    if kind == 0:
        return poisoned(content, path, monitor)
    out = copy.deepcopy(content)
    (key,) = [key for key in out["callbacks"] if key.startswith("ModelCheckpoint")]
    state = out["callbacks"][key]
    if kind == 1:
        state[rng.choice(KEYS)] = path
    elif kind == 2:  # the folder of checkpoints itself moves
        state |= {"dirpath": str(Path(path).parent), "best_model_path": path}
        state["best_k_models"] = {path: torch.tensor(9e9)}
    else:  # what is no path at all
        state |= dict.fromkeys(KEYS, rng.choice([3, None, [path], {path: path}, b"x", "a" * 9000]))
        state["best_k_models"] = rng.choice([[], {3: 4}, {path: "x"}, {path: torch.zeros(3)}])
    for name in ("hparams_name", "datamodule_hparams_name", "resume", "weights", "ckpt_path"):
        out[name] = path
    return out


def strangers(n: int, folder: Path, seed: int) -> Iterator[str]:
    """`n` checkpoints, each resumed by a training that removes the one before at every step."""
    load_toy()
    rng = random.Random(seed)
    for i in range(n):
        monitor = bool(i % 2)
        flags = ["checkpoint.every_n_train_steps=1", *(MONITOR if monitor else [])]
        flags += [] if monitor else ["checkpoint.save_top_k=1"]
        if i < 2 or i % 20 < 2:
            cwd = fresh(folder / f"run{int(monitor)}")
            first = Child(toy_command(*flags, "trainer.max_steps=1"), cwd / "first.log", cwd)
            if problem := ends_well(first, may_fail=False):
                raise UserError(f"the run that writes the checkpoint failed: {problem}")
            paths = victims(cwd)
            kept = read(cwd / LAST)
        cwd = folder / f"run{int(monitor)}"
        before = {p: data for p, data in contents(cwd).items() if b"precious" in data}
        path = rng.choice(paths)
        torch.save(_strange(kept, path, monitor, rng), cwd / LAST)
        more = (*flags, f"resume={LAST}", "trainer.max_steps=4")
        problem = ends_well(Child(toy_command(*more), cwd / f"{i}.log", cwd))
        now = {p: Path(p).read_bytes() if Path(p).is_file() else b"gone" for p in before}
        if len(before) < 5 or now != before:
            problem = f"{len(before)} files before, and {now} after"
        yield f"{path}: {problem}" if problem else ""
