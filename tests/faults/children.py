"""Runs of ``launch.py`` in forked children of a process that has imported everything already."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.runs import ROOT, small_run

CONFIGS = {
    "gs-embedding": ["lods-gs-embedding.yaml", "pocket-shapes.yaml"],
    "gs-lora": ["lods-gs-lora.yaml", "pocket-shapes.yaml"],
    "ngp-embedding": ["lods-ngp-embedding.yaml", "pocket-shapes-ngp.yaml"],
}
_NGP = "system.geometry.pos_encoding_config={n_levels: 2, log2_hashmap_size: 8, base_resolution: 4}"


def command(config: str, model, root, steps: int, mode: str = "--train", *more: str) -> list:
    """Arguments of ``launch.py`` for a run of seconds, with results under `root`."""
    files = [str(ROOT / "configs" / name) for name in CONFIGS[config]]
    own = ["system.geometry.ball={n_points: 120, radius: 0.6}", "system.geometry.init_type=ball"]
    if config.startswith("ngp"):
        own = [_NGP, "data.resolution_milestones=[]", "system.renderer.num_samples_per_ray=24"]
        own += [
            "system.geometry.isosurface_resolution=16",
            "system.geometry.isosurface_threshold=3",
        ]
    return [
        *("--config", *files, mode, *small_run(model), *own),
        f"trainer.max_steps={steps}",
        "trainer.val_check_interval=8",
        "trainer.log_every_n_steps=1",
        "checkpoint.every_n_train_steps=2",
        f"exp_root_dir={root}",
        *more,
    ]


def trial_of(config: str, root) -> Path:
    """The folder of such a run."""
    return Path(root) / f"lods-{config}" / "t"


class Child:
    """``launch.py argv`` in a child process, its output in the file `log`. `before` is called in
    the child first. `argv` may also be a function, to be called instead."""

    def __init__(self, argv, log, cwd, before: "Callable | None" = None) -> None:
        self.log, self.status = Path(log), None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(argv, cwd, before))

    def _run(self, argv, cwd, before) -> int:
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            os.chdir(cwd)
            if before is not None:
                before()
            if callable(argv):
                return int(argv() or 0)
            import launch

            return launch.main(argv)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush(), sys.stderr.flush()

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def wait(self, timeout: float = 300.0) -> int:
        """The exit status, negative for a signal; a child that takes too long is killed."""
        end = time.monotonic() + timeout
        while self.running() and time.monotonic() < end:
            time.sleep(0.005)
        if self.running():
            self.kill()
        return self.status

    def kill(self) -> None:
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def ends_well(child: Child, *, may_fail: bool = True) -> str:
    """What is wrong with how a run ended, or "": it must have succeeded or, if it may fail, ended
    with status 2 and one line that says why."""
    status, output = child.wait(), child.output()
    if "Traceback" in output:
        return "a traceback: " + output[output.rindex("Traceback") :].strip().splitlines()[-1]
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    if status == 0 or (may_fail and status == 2 and len(lines) == 1):
        return ""
    return f"status {status}, {len(lines)} lines of error: {' '.join(output.split())[-200:]}"


class Table:
    """Counts and failures of each kind of fault, printed as they come."""

    def __init__(self) -> None:
        self.failed = False
        print(f"{'fault':<44}{'times':>7}{'failed':>8}{'seconds':>9}", flush=True)

    def row(self, name: str, problems: Iterator[str]) -> None:
        """`problems`: one text per trial, "" if all was well."""
        start, found = time.monotonic(), list(problems)
        bad = [problem for problem in found if problem]
        self.failed |= bool(bad) or not found
        seconds = time.monotonic() - start
        print(f"{name:<44}{len(found):>7}{len(bad):>8}{seconds:>9.0f}", flush=True)
        for problem in list(dict.fromkeys(bad))[:5]:
            print(f"    {problem[:300]}", flush=True)
