"""The evaluation harness at work: runs in this process, in their own, and on a stand-in of Ray."""

import base64
import io
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import evaluate
from evaluation import command, processes
from evaluation.batch import Job, Outcome
from evaluation.grid import TRUE, Run, load_grid
from evaluation.processes import Local
from evaluation.run import Recorder, carry_out, curve, ends, load_run, scale_rates, work
from evaluation.table import CURVES, RESULTS, Table, begun
from tests.runs import ROOT
from tests.study.test_evaluation import make_tiny_clip

GRID = """
methods:
  sds: {guidance_type: lods-sds-guidance}
  lods: {guidance_type: lods-embedding-guidance, overrides: {system.guidance.guidance_scale: 5.0}}
representations:
  2d:
    configs: [evaluation/playground.yaml]
    steps: 25
    overrides: {data.n_particles: 3}
  gaussians:
    configs: [configs/lods-gs-embedding.yaml, configs/pocket-shapes.yaml]
    steps: 3
    views: 4
    overrides:
      data.batch_size: 2
      data.width: 16
      data.height: 16
      data.eval_width: 32
      data.eval_height: 32
      system.geometry.ball.n_points: 200
prompts: [a red car]
seeds: [0]
overrides: {system.prompt_processor.pretrained_model_name_or_path: MODEL}
"""


@pytest.fixture
def grid(tiny_sd, tmp_path, monkeypatch):
    """``grid(old, new, ...)``: the file of GRID with these texts replaced, for a tiny model."""
    monkeypatch.chdir(tmp_path)  # for the cache of embeddings

    def make(*changes):
        text = GRID.replace("MODEL", tiny_sd(sample_size=4))
        for old, new in zip(changes[::2], changes[1::2]):
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "try.yaml"
        path.write_text(text)
        return path

    return make


def pick(path, on, method):
    return next(r for r in load_grid(path).runs if (r.representation, r.method) == (on, method))


POCKET = ("object_accuracy", "color_accuracy", "frechet", "janus_rate", "silhouette_iou")


@pytest.mark.parametrize("on, steps", [("2d", 25), ("gaussians", 3)])
def test_a_run_gives_a_row_curves_and_a_sheet(grid, tmp_path, on, steps):
    run = pick(grid(), on, "lods")
    result = carry_out(run, 1, "abc", tmp_path)
    row = result["row"]
    assert row["status"] == "ok" and tuple(sorted(row)) == tuple(sorted(RESULTS))
    flat = on == "2d"
    absent = {k for k in POCKET if not row[k]}
    assert absent == ({"janus_rate", "silhouette_iou"} if flat else set())
    assert all(0 <= float(row[k]) <= 1 for k in POCKET if k not in absent | {"frechet"})
    assert (row["kind"], row["color"], row["settings"]) == (
        "car",
        "red",
        "system.guidance.guidance_scale=5.0",
    )
    assert float(row["seconds"]) / steps == pytest.approx(float(row["seconds_per_step"]), rel=1e-4)
    assert float(row["prior_loss_first"]) > 0 and float(row["prior_loss_last"]) > 0
    assert row["device"] == "cpu" and row["commit"] == "abc" and row["torch"] == torch.__version__
    assert float(row["peak_mib"]) > 100 and not row["clip_score"]
    curves = result["curves"]
    assert len(curves) == min(steps, 20) and curves[-1]["step"] == steps
    assert all(tuple(sorted(r)) == tuple(sorted(CURVES)) for r in curves)
    assert all(float(r[k]) > 0 for r in curves for k in ("loss_sds", "prior_loss", "grad_norm"))
    picture = Image.open(io.BytesIO(base64.b64decode(result["sheet"])))
    assert picture.format == "WEBP" and picture.size == (64 * (3 if flat else 4), 64)
    # a seed is a result
    again, other = (carry_out(r, 1, "abc", tmp_path)["row"] for r in (run, replace(run, seed=1)))
    for key in ("frechet", "prior_loss_last"):
        assert again[key] == row[key] != other[key]


def test_a_method_that_learns_nothing_has_no_loss_of_its_own(grid, tmp_path):
    result = carry_out(pick(grid(), "2d", "sds"), 1, "", tmp_path)
    assert result["row"]["status"] == "ok" and result["row"]["prior_loss_last"] == ""
    assert all(r["prior_loss"] == "" and float(r["loss_sds"]) > 0 for r in result["curves"])


@pytest.mark.parametrize("on", ["2d", "gaussians"])
def test_true_renders_are_judged_like_a_run(grid, tmp_path, on):
    row = carry_out(pick(grid("views: 4", "views: 12"), on, TRUE), 1, "", tmp_path)["row"]
    assert row["status"] == "ok" and row["steps"] == "0" and row["seconds"] == ""
    assert float(row["object_accuracy"]) > 0.6 and float(row["color_accuracy"]) > 0.6
    if on == "gaussians":
        assert float(row["silhouette_iou"]) > 0.8 and float(row["janus_rate"]) < 0.5


def test_real_models_are_judged_by_clip_alone(grid, tmp_path):
    clip = make_tiny_clip(tmp_path / "clip")
    path = grid("seeds: [0]\n", f"seeds: [0]\njudge: false\nclip: {clip}\n", "a red car", "a horse")
    assert {r.method for r in load_grid(path).runs} == {"sds", "lods"}
    row = carry_out(pick(path, "gaussians", "sds"), 1, "", tmp_path)["row"]
    assert row["status"] == "ok" and 0 <= float(row["clip_score"]) <= 100
    assert not any(row[k] for k in (*POCKET, "kind", "color"))


def test_what_goes_wrong_is_the_status(grid, tmp_path):
    run = pick(grid(), "2d", "lods")
    rate = "system.optimizer.params.guidance.lr=1.0e+30"
    row = carry_out(replace(run, overrides=(*run.overrides, rate)), 1, "", tmp_path)["row"]
    assert "loss_embedding not finite at step" in row["status"] and row["frechet"] == ""
    for wrong, text in (
        ("system.guidance.scale=1", "has no field 'guidance.scale'"),
        ("system.loss.lambda_sds=1", "system of latents has no field 'system.loss'"),
        ("data.particles=1", "data of latents has no field 'data.particles'"),
        ("system.optimizer.params.particle.lr=1", "latents have system.optimizer.params"),
    ):
        result = carry_out(replace(run, overrides=(*run.overrides, wrong)), 1, "", tmp_path)
        assert text in result["row"]["status"] and "\n" not in result["row"]["status"]
        assert result["curves"] == [] and result["sheet"] is None


def test_a_clip_that_is_not_there_costs_no_training(grid, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.run.latents", lambda *_: pytest.fail("it was trained"))
    path = grid("seeds: [0]\n", "seeds: [0]\njudge: false\nclip: no/folder\n")
    row = carry_out(pick(path, "2d", "sds"), 1, "", tmp_path)["row"]
    assert "the CLIP 'no/folder' cannot be had" in row["status"]


def test_scene_lr_scales_what_is_optimised_and_not_what_is_learnt(grid, tmp_path):
    path = grid()
    for on in ("2d", "gaussians"):
        run = pick(path, on, "lods")
        plain, half = (load_run(replace(run, scene_lr=s), tmp_path).system for s in (1.0, 0.5))
        for name, group in plain.optimizer.params.items():
            factor = 1 if name == "guidance" else 0.5
            assert half.optimizer.params[name].lr == pytest.approx(factor * group.lr)
    start, v0, v1, end = plain.lr_schedule["geometry.means"]
    assert v0 > v1 > 0 and half.lr_schedule["geometry.means"] == [start, v0 / 2, v1 / 2, end]
    longer = load_run(run, tmp_path)
    longer.system.lr_schedule = {"a": [1, 2.0, 3.0, 4, 5.0, 6], "b": [1.0, 2.0, 3]}
    scale_rates(longer, 2.0)
    assert longer.system.lr_schedule == {"a": [1, 4.0, 6.0, 4, 10.0, 6], "b": [0, 2.0, 4.0, 3]}


def test_a_curve_is_made_of_means():
    guidance, recorder = torch.nn.Identity(), Recorder()
    recorder.watch(guidance)
    for step in range(50):
        for call in range(2):  # a step may ask twice
            guidance({"loss_sds": torch.tensor(step + call - 0.5), "loss_a": 1.0, "loss_b": 2.0})
        recorder.end_step()
    steps = recorder.steps()
    assert np.array_equal(steps[:, 0], np.arange(50)) and (steps[:, 1] == 3).all()
    assert np.isnan(steps[:, 2]).all()
    rows = curve(steps)
    assert len(rows) == 20 and rows[-1]["step"] == 50 and rows[0]["grad_norm"] == ""
    edges = [0, *(r["step"] for r in rows)]
    for low, high, row in zip(edges, edges[1:], rows):
        assert float(row["loss_sds"]) == pytest.approx((low + high - 1) / 2)
    assert ends(steps[:, 0]) == (2.0, 47.0)
    assert all(map(math.isnan, ends(np.zeros(0)))) and curve(np.zeros((0, 3))) == []


# --- many runs ------------------------------------------------------------------------------------


class Fake:
    """A backend whose runs are over at once; ``fails`` are those of these seeds."""

    def __init__(self, fails=(), slots=2, stop_after=None, stop_by=signal.SIGINT):
        self.slots, self.fails = slots, fails
        self.stop_after, self.stop_by = stop_after, stop_by
        self.going, self.did, self.closed = [], [], False

    def submit(self, job):
        self.going.append(job)
        return len(self.did) + len(self.going)

    def wait(self):
        if self.stop_after is not None and len(self.did) >= self.stop_after:
            os.kill(os.getpid(), self.stop_by)
        handle, job = len(self.did) + 1, self.going.pop(0)
        run, seed = Run.of(job.argument["run"]), job.argument["run"]["seed"]
        self.did.append(seed)
        if seed in self.fails:
            return [(handle, Outcome(None, "broken", "what it said"))]
        row = begun(run, job.threads, job.argument["commit"]) | {"status": "ok"}
        return [(handle, Outcome({"row": row, "curves": [], "sheet": None}))]

    def close(self):
        self.closed = True


@pytest.fixture
def many(grid, tmp_path, monkeypatch):
    """``many(*arguments, **of_fake)``: evaluate.py over eight seeds; (status, the backend)."""
    path = grid("seeds: [0]", "seeds: [0, 1, 2, 3, 4, 5, 6, 7]\ntrue_renders: false")
    monkeypatch.setattr(command, "WORK", tmp_path / "work")

    def run(*arguments, **kwargs):
        fake = Fake(**kwargs)
        monkeypatch.setattr(command, "Local", lambda *_: fake)
        only = ["--only", "prior=sds", "representation=2d"]
        status = evaluate.main([str(path), *only, "--out", str(tmp_path / "out"), *arguments])
        return status, fake

    return run


def test_what_is_done_is_not_repeated(many, tmp_path, capsys):
    status, fake = many("--only", "seed=3,4")
    assert status == 0 and fake.did == [3, 4] and fake.closed
    assert many("--dry-run")[1].did == []
    said = capsys.readouterr().out
    assert "8 runs, 2 done, 0 failed, 6 left" in said and said.count("2d sds 'a red car' seed") == 8
    assert "[1/2]" in said and "less than a minute left" in said
    assert many(fails=[5])[0] == 1
    said = capsys.readouterr().out
    assert "seed 5: FAILED: broken" in said
    (log,) = (tmp_path / "work/logs/try").glob("2d-sds-a-red-car-5-*.txt")
    assert log.read_text() == "what it said"
    status, fake = many()
    assert (status, fake.did) == (1, [])
    assert "7 done, 1 failed (--retry repeats them), 0 left" in capsys.readouterr().out
    status, fake = many("--retry")
    assert (status, fake.did) == (0, [5])
    rows = Table(tmp_path / "out").rows()
    assert sorted(int(r["seed"]) for r in rows) == list(range(8))
    assert {r["status"] for r in rows} == {"ok"}


def test_rows_tell_of_code_that_changes_under_a_grid(many, tmp_path, monkeypatch):
    now = iter("aab")  # when it starts, and at each run
    monkeypatch.setattr(command, "code", lambda: next(now))
    monkeypatch.setattr(command, "commit", lambda: "abc")
    many("--only", "seed=0,1")
    assert [r["commit"] for r in Table(tmp_path / "out").rows()] == ["abc", "abc-changed"]


def test_a_failure_is_repeated_by_one(many, tmp_path):
    many("--only", "seed=2", fails=[2])
    table, runs = Table(tmp_path / "out"), load_grid(tmp_path / "try.yaml").runs
    (run,) = (r for r in runs if (r.representation, r.method, r.seed) == ("2d", "sds", 2))
    session = command.Session(table, 1, True, {run: table.find(run)})
    assert session.due(run)
    table.record(table.find(run) | {"status": "broken again"}, [], None)
    assert not session.due(run)


def test_a_full_disk_is_one_line(many, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Table, "record", full)
    assert many()[0] == 2
    assert "results.csv cannot be written (No space left" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_loses_what_was_in_progress(many, tmp_path, capsys, signum):
    status, fake = many(stop_after=3, stop_by=signum)
    assert status == 130 and fake.closed and "interrupted" in capsys.readouterr().out
    assert len(Table(tmp_path / "out").rows()) == 3
    status, fake = many()
    assert status == 0 and fake.did == [3, 4, 5, 6, 7]


def test_two_at_one_table_share_the_runs(many, tmp_path):
    table = Table(tmp_path / "out")
    runs = [r for r in load_grid(tmp_path / "try.yaml").runs if r.seed in (1, 2)]
    claims = [table.claim(r) for r in runs if (r.representation, r.method) == ("2d", "sds")]
    assert len(claims) == 2 and all(claims)
    status, fake = many()
    assert status == 1 and fake.did == [0, 3, 4, 5, 6, 7]  # two are not done yet
    for claim in claims:
        claim.release()
    assert many()[1].did == [1, 2]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--only", "prior=sdss"], "the grid try has no method 'sdss': did you mean 'sds'"),
        (["--only", "model=x"], "--only 'model=x': write representation=..., method="),
        (["--only", "seed=9"], "has no seed '9': there are 0, 1"),
        (["--ray"], "--ray needs the package ray"),
    ],
)
def test_a_mistake_is_one_line(many, monkeypatch, capsys, arguments, text):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert many(*arguments)[0] == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and text in lines[0]


def test_an_unknown_guidance_is_found_before_anything_runs(grid, tmp_path, capsys):
    path = grid("lods-sds-guidance", "lods-sdss-guidance")
    assert evaluate.main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert "registered as 'lods-sdss-guidance': did you mean 'lods-sds" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["g.yaml", "--quick"], ["g.yaml", "--workers", "0"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


# --- processes ------------------------------------------------------------------------------------


BOTH = [processes.Forked, pytest.param(processes.Process, marks=pytest.mark.slow)]


def make_job(run, threads, commit):
    argument = {"run": asdict(run), "threads": threads, "commit": commit}
    return Job(run.title, work, argument=argument, threads=threads)


@pytest.mark.parametrize("kind", BOTH)
def test_a_run_has_a_process_of_its_own(kind, grid, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "Forked", kind)
    run = pick(grid(), "2d", "lods")
    backend = Local(2, command.PRELOAD, tmp_path / "work")
    handle = backend.submit(make_job(run, 1, "abc"))
    assert type(handle) is kind
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = carry_out(run, 1, "abc", tmp_path)
    finally:
        torch.set_num_threads(threads)
    [(done, there)] = backend.wait()
    assert done is handle and "Prompt [a red car]" in there.log and not there.error
    there = there.value
    timed = dict.fromkeys(("seconds", "seconds_per_step", "peak_mib"))
    assert there["row"] | timed == here["row"] | timed and here["row"]["status"] == "ok"
    assert there["curves"] == here["curves"] and there["sheet"] == here["sheet"]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_process_that_dies_is_a_row(tmp_path, grid):
    run = pick(grid("steps: 25", "steps: 1000000"), "2d", "lods")
    session = command.Session(Table(tmp_path / "out"), 1)
    job, claim = session.start(run)
    process = processes.Process(job.task(), scratch=tmp_path / "work")
    os.kill(process.pid, signal.SIGKILL)
    while process.status() is None:
        time.sleep(0.01)
    session.record(run, process.outcome())
    claim.release()
    (row,) = session.table.rows()
    assert row["status"].startswith("the process was killed (signal 9)")
    assert row["prior"] == "lods" and row["commit"] == session.commit
    assert list((tmp_path / "work").iterdir()) == []


# with a light job: test_a_killed_batch_leaves_no_process_and_goes_on
@pytest.mark.slow
@pytest.mark.parametrize("kind", [processes.Forked, processes.Process])
def test_kill_9_leaves_no_process_and_no_claim(kind, grid, tmp_path):
    path = grid("steps: 25", "steps: 1000000")
    argv = [str(path), "--out", str(tmp_path / "out"), "--only", "method=sds", "canvas=2d"]
    code = (
        "import sys, evaluation.command as c, evaluation.processes as p, evaluate\n"
        f"c.WORK = p.Path({str(tmp_path / 'work')!r})\n"
        f"p.Forked = p.{kind.__name__}\n"
        "sys.exit(evaluate.main(sys.argv[1:]))"
    )
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, stderr=log)
    logs, start, table = [], time.time(), Table(tmp_path / "out")
    try:
        while not any("Prompt [" in f.read_text() for f in logs):  # it is under way
            late = driver.poll() is not None or time.time() - start > 300
            assert not late, (tmp_path / "log").read_text()
            time.sleep(0.05)
            logs = list((tmp_path / "work").glob("run-*/log.txt"))
        children = psutil.Process(driver.pid).children(recursive=True)
        assert table.claim(pick(path, "2d", "sds")) is None
    finally:
        driver.kill()
        driver.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone and not alive and not any((tmp_path / "work").glob("run-*"))
    assert table.claim(pick(path, "2d", "sds")) is not None and table.rows() == []
