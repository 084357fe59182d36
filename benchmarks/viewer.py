"""What the live view costs, as ratios within one run.

``python benchmarks/viewer.py`` trains a Gaussian run and a radiance field with the embedded model.
Its steps are in rounds of four phases, so that whatever else slows the machine slows all of them;
every second round has them in reverse, as steps become slower while an object grows:

- ``off``: no view;
- ``nobody``: the view is there, and no visitor;
- ``resting``: one visitor whose camera does not move, with the share of the time that is the
  default;
- ``moving``: one visitor who moves the camera thirty times a second.

``seconds`` is the mean time of a step, ``over_off`` its ratio to that of ``off``, in the median
over rounds; ``accounted`` is the part of the time between the first and the last of these steps
that the view has noted as its own, in the median, which would make the ratio 1 / (1 - accounted)
if it cost nothing else. A visitor comes anew in each round, and the picture that it then waits for,
which may take two seconds, counts in ``resting``: its share is kept by a phase that is some twenty
times as long. ``frames`` counts the pictures that the visitor got. ``latency_ms`` (moving) is the
median time from a camera's message to the next picture that arrives. ``memory_mib`` is how much the
process has grown after 2,000 more messages from a moving camera. The visitor is a process of its
own, without a browser, on the same cores.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import pytorch_lightning as pl
from timing import ROOT, machine, show, write_table
from training import set_up, train
from viewer_visitor import MESSAGES

PHASES = ("off", "nobody", "resting", "moving")
CONFIGS = ("lods-gs-embedding", "lods-ngp-embedding")
SKIPPED = 2  # steps of a phase that do not count: something has just changed


# --- the run --------------------------------------------------------------------------------------


class Rounds(pl.Callback):
    """Times the steps of each phase. It is the last callback; ``view`` is the one before it."""

    def __init__(self, view, steps: int) -> None:
        self.view, self.steps = view, steps
        self.live = None
        self.visitor = None
        self.taken: dict[str, list[list[float]]] = {phase: [] for phase in PHASES}
        self.frames = dict.fromkeys(PHASES, 0)
        self.latencies: list[float] = []
        self.memory = float("nan")
        self.accounted: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._in_phase = 0
        self._at = self._since = time.perf_counter()
        self._before = 0.0

    def order(self, word: str) -> list[str]:
        """Tell the visitor, and return what it has to report of what it did before."""
        self.visitor.stdin.write(f"{word}\n")
        self.visitor.stdin.flush()
        return self.visitor.stdout.readline().split()

    def on_train_start(self, trainer, pl_module) -> None:
        self.live = self.view.live
        port = str(self.view.server.port)
        self.visitor = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("viewer_visitor.py")), port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.order("gone")  # it is there, and all is imported
        self.phase: str | None = None
        self._turn = 0

    def _next(self) -> None:
        before = self.phase
        if before is not None:
            part = (self.live.budget.total - self._before) / (time.perf_counter() - self._since)
            self.accounted[before].append(part)
        done, place = divmod(self._turn, len(PHASES))
        name = self.phase = (PHASES if done % 2 == 0 else PHASES[::-1])[place]
        self._turn += 1
        told = self.order(name if name in ("resting", "moving") else "gone")
        if before is not None:
            self.frames[before] += int(told[0])
        if before == "moving":
            self.latencies += [float(word) for word in told[1:]]
        self.view.live = None if name == "off" else self.live
        self.live.progress.skip()
        self.taken[name].append([])
        # who comes and rests waits for a picture first: that counts
        self._in_phase = 0 if name == "resting" else -SKIPPED

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now = time.perf_counter()
        if trainer.global_step > 5:  # by then all is compiled
            if self.phase is not None and self._in_phase >= 0:
                self.taken[self.phase][-1].append(now - self._at)
            self._in_phase += 1
            if self.phase is None or self._in_phase >= self.steps:
                self._next()
            if self._in_phase == 0:
                self._since, self._before = time.perf_counter(), self.live.budget.total
        self._at = time.perf_counter()

    def on_train_end(self, trainer, pl_module) -> None:
        self.view.live = self.live

    def finish(self, serve) -> None:
        """The messages that memory is measured with, served as a paused run serves them."""
        self.order("resting")
        serve(3.0)
        process = psutil.Process()
        before = process.memory_info().rss
        self.visitor.stdin.write("flood\n")
        self.visitor.stdin.flush()
        serve(MESSAGES * 0.006)
        self.memory = (process.memory_info().rss - before) / 2**20
        self.visitor.stdout.readline()
        self.order("end")
        self.visitor.wait(20)


def measure(config: str, rounds: int, steps: int) -> list[dict]:
    from threestudio.run.interrupt import InterruptGuard
    from threestudio.run.interventions import Interventions
    from threestudio.run.viewer import options, server
    from threestudio.run.viewer.callback import ViewerCallback

    with tempfile.TemporaryDirectory() as folder:
        _, system, data = set_up(config, True, [], Path(folder))
        chosen = options.ViewerOptions(0)
        view = ViewerCallback(
            chosen, server.listen(chosen), folder, InterruptGuard(), Interventions()
        )
        clock = Rounds(view, steps)

        class Last(pl.Callback):  # while the view is still there
            def on_train_batch_end(self, trainer, pl_module, *args):
                if trainer.global_step != trainer.max_steps:
                    return
                view.live = clock.live

                def serve(seconds):
                    end = time.monotonic() + seconds
                    while time.monotonic() < end:
                        clock.live.idle()

                clock.live.paused = True
                clock.finish(serve)
                clock.live.paused = False

        count = 6 + len(PHASES) * rounds * (steps + SKIPPED) + 1

        class All(pl.Callback):  # one callback, so that the order is this one
            pass

        for hook in ("on_train_start", "on_train_batch_end", "on_train_end", "on_exception"):
            parts = [getattr(c, hook) for c in (view, clock, Last())]
            setattr(All, hook, lambda self, *args, parts=parts: [part(*args) for part in parts])
        train(system, data, "cpu", count, All())
    return [row_of(config, phase, clock, rounds, steps) for phase in PHASES]


def row_of(config: str, phase: str, clock: Rounds, rounds: int, steps: int) -> dict:
    means = {
        name: [sum(taken) / len(taken) for taken in clock.taken[name][:rounds]] for name in PHASES
    }
    ratios = [a / b for a, b in zip(means[phase], means["off"])]
    moving = phase == "moving"
    return {
        "config": config,
        "phase": phase,
        "rounds": rounds,
        "steps": rounds * steps,
        "seconds": f"{sum(means[phase]) / len(means[phase]):.4f}",
        "over_off": f"{median(ratios):.3f}",
        "accounted": f"{median(clock.accounted[phase][:rounds]):.3f}",
        "frames": clock.frames[phase],
        "latency_ms": f"{1000 * median(clock.latencies):.0f}" if moving and clock.latencies else "",
        "memory_mib": f"{clock.memory:.1f}" if moving else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="of a phase in a round")
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/viewer.csv")
    parser.add_argument("--note", default="", help="a column, such as what else was running")
    args = parser.parse_args()
    about, rows = machine(), []
    for config in args.configs:
        for row in measure(config, args.rounds, args.steps):
            rows.append({**row, "note": args.note, **about})
            show(rows[-1], about)
    write_table(args.out, rows)


if __name__ == "__main__":
    main()
