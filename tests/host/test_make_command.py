"""``lods make``: what is asked for, and how it goes on."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from lods import cli
from lods.commands import job, make
from lods.commands.job import Request

from tests.host.commands import away, refused
from tests.run_folders import make_run
from tests.runs import ROOT, small_run

__all__ = ["away"]  # a fixture

LIBRARY = ROOT / "custom" / "threestudio-lods"
ARMCHAIR = {"prompt": "a red armchair", "model": "pocket", "small": True}


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "give a prompt, or --prompts FILE"),
        ([""], "a prompt is empty"),
        (["a ${x}"], "which configs take for a reference"),
        (["???"], "a missing value"),
        (["a car " * 20_000], "5000 are the most"),
        (["a red armchir"], "did you mean 'armchair'?"),
        (["a red armchair", "--method", "lods-loras"], "did you mean 'lods-lora'?"),
        (["a red armchair", "--on", "points"], "'points'"),
        (["a red armchair", "--model", "sd-15"], "did you mean 'sd15'?"),
        (["a red armchair", "--steps", "0"], "number from 1 to"),
        (["a red armchair", "--seed", "-1"], "is not a number from 0"),
        (
            ["a snowman", "--model", "pocket-shapes", "--quality", "best"],
            "no overlay pocket-shapes-best",
        ),
        (["--prompts", "none.txt"], "--prompts none.txt cannot be read: No such file"),
        (["--ray", "a red armchair", "a car"], "--ray takes the word after it for an address"),
        (["--status"], "nothing was made in outputs/make"),
    ],
)
def test_make_refuses_early_in_one_line(capsys, monkeypatch, argv, text):
    monkeypatch.setattr(job, "start", lambda words: pytest.fail("it has begun"))
    assert text in refused(capsys, "make", *argv)
    assert not Path("outputs").exists()


def test_prompts_come_from_words_and_from_a_file_each_once(away):
    (away / "list.txt").write_text("# my list\na car\n\n  a   house \n")
    args = make.parse_args(["a car", "seed=2", "--prompts", "list.txt"], "lods make")
    assert args.prompts == ["a car", "a house"] and args.overrides == ["seed=2"]


def test_a_file_of_prompts_that_is_no_text_is_refused(away):
    (away / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a text in UTF-8"):
        make.read_prompts(away / "list.txt")


@pytest.mark.parametrize(
    ("on", "method", "small", "configs"),
    [
        ("gaussians", "lods-lora", True, ["lods-gs-lora", "pocket-shapes"]),
        ("gaussians", "lods-vsd", True, ["lods-gs-lora", "pocket-shapes"]),
        ("gaussians", "lods-sds", False, ["lods-gs-embedding"]),
        ("nerf", "lods-embedding", True, ["lods-ngp-embedding", "pocket-shapes-ngp"]),
        ("nerf", "lods-lora", False, ["lods-ngp-lora"]),
        ("mesh", "lods-sds", True, ["lods-mesh-embedding", "pocket-shapes-mesh"]),
        ("mesh", "lods-vsd", False, ["lods-mesh-embedding", "mesh-lora"]),
    ],
)
def test_make_takes_the_configs_of_the_representation_and_the_method(on, method, small, configs):
    request = Request("a red armchair", on, method, "pocket-shapes", small)
    words = request.words(Path("x"))
    assert words[: words.index("--train")] == ["--config", *configs]
    assert f"system.guidance_type={method}-guidance" in words


@pytest.mark.parametrize(
    ("on", "method", "quality", "overlays"),
    [
        ("gaussians", "lods-sds", "good", ["pocket"]),
        ("gaussians", "lods-lora", "draft", ["pocket", "pocket-lora", "pocket-draft"]),
        ("nerf", "lods-vsd", "good", ["pocket-ngp", "pocket-lora"]),
        ("nerf", "lods-embedding", "best", ["pocket-ngp", "pocket-ngp-best"]),
        ("mesh", "lods-embedding", "draft", ["pocket-mesh", "pocket-mesh-draft"]),
    ],
)
def test_the_method_and_the_quality_add_overlays(on, method, quality, overlays):
    request = Request("a cupcake", on, method, "pocket", True, quality=quality)
    words = request.words(Path("x"))
    assert words[2 : words.index("--train")] == overlays


def test_a_quality_has_a_folder_of_its_own():
    good, draft = (
        Request(**ARMCHAIR, on="nerf", method="lods-sds", quality=q) for q in ("good", "draft")
    )
    folders = {make.folder_of(request, Path("out")).name for request in (good, draft)}
    assert folders == {"a_red_armchair-nerf-lods-sds", "a_red_armchair-nerf-lods-sds-draft"}
    assert good.key != draft.key


@pytest.mark.parametrize("on", list(job.BASE))
@pytest.mark.parametrize("method", ["lods-embedding", "lods-lora", "lods-sds", "lods-vsd"])
@pytest.mark.parametrize("quality", job.QUALITIES)
def test_what_make_asks_for_is_a_valid_config(on, method, quality):
    from threestudio.run.arguments import Program, find_config, parse_args
    from threestudio.run.preflight import read_config

    request = Request(
        "a car: red", on, method, "pocket", True, 3, 7, ("trainer.precision=32",), quality=quality
    )
    call = parse_args(request.words(Path("x")), Program(home=ROOT))
    files = [find_config(word, call.program) for word in call.args.config]
    cfg = read_config(files, call.overrides, "train")
    assert cfg.trial_dir == f"x/run/{request.key}" and (cfg.seed, cfg.trainer.max_steps) == (3, 7)
    assert cfg.system.prompt_processor.prompt == "a car: red"


def test_the_key_tells_all_settings_apart_but_the_gpu():
    one = Request("a car", "nerf", "lods-sds", "pocket-shapes", True)
    same = Request("a car", "nerf", "lods-sds", "pocket-shapes", True, gpu="1")
    other = Request("a car", "nerf", "lods-sds", "pocket-shapes", True, steps=9)
    assert one.key == same.key != other.key


def test_a_request_of_version_0_2_keeps_its_key_and_a_model_of_the_same_name_has_another():
    old = {**ARMCHAIR, "on": "nerf", "method": "lods-sds", "seed": 0, "steps": None}
    old = {key: old[key] for key in ("prompt", "on", "method", "model", "small", "seed", "steps")}
    old |= {"model": "pocket", "overrides": []}
    request = Request.of({**old, "gpu": None})
    assert request.key == hashlib.sha256(json.dumps(old).encode()).hexdigest()[:8]
    assert dataclasses.replace(request, latents=8).key != request.key


def test_make_tells_a_model_by_a_former_name_from_the_one_that_had_it():
    said = {}
    for name, prompt in (("pocket-shapes", "a mushroom"), ("pocket", "a cupcake")):
        [request] = make.requests(make.parse_args([prompt, "--model", name], "lods make"))
        said[name] = request.latents
    assert said == {"pocket-shapes": 0, "pocket": 8}


@pytest.fixture
def trained(monkeypatch):
    """Runs that are made by writing files; ``statuses`` are what the next ones end with."""
    statuses, started, asked_for = [], [], []

    def start(words, asked=""):
        started.append(words)
        asked_for.append(asked)
        status = statuses.pop(0) if statuses else 0
        given = dict(word.split("=", 1) for word in words if "=" in word)
        if "resume" in given:
            run = Path(given["resume"]).parent.parent
        else:
            run = Path(given["exp_root_dir"], given["name"], given["tag"])
        make_run(run)
        save = run / "save"
        (save / "it4-export").mkdir(parents=True, exist_ok=True)
        if not status:
            for name in ("it4-test.mp4", "it4-test-sheet.png", "it4-export/gaussians.ply"):
                (save / name).write_text(name)
        return status

    monkeypatch.setattr(job, "start", start)
    started_and = type("Trained", (), {"words": started, "statuses": statuses, "asked": asked_for})
    return started_and


FOLDER = Path("outputs/make/a_red_armchair-gaussians-lods-embedding")


def test_make_trains_exports_and_shows_the_files(trained, capsys):
    assert cli.main(["make", "a red armchair"]) == 0
    assert ["--train" in words for words in trained.words] == [True, False]
    shown = capsys.readouterr().out.splitlines()[-4:]
    assert shown == [
        "a red armchair:",
        *(f"  {FOLDER / name}" for name in ("picture.png", "video.mp4", "gaussians.ply")),
    ]
    assert (FOLDER / "video.mp4").read_text() == "it4-test.mp4"


def test_a_run_is_told_the_command_that_was_typed(trained):
    assert cli.main(["make", "a red armchair", "--steps", "9"]) == 0
    assert trained.asked == ["lods make 'a red armchair' --steps 9", ""]


@pytest.mark.parametrize(
    "argv",
    [
        ["a red armchair", "--model", "pocket"],
        ["it's a car", "--on", "nerf", "--method", "sds", "--model", "pocket", "--seed", "3"],
        ["a car", "--model", "pocket", "--quality", "draft", "--steps", "9", "data.batch_size=2"],
    ],
)
def test_the_command_of_a_request_asks_for_it_again(argv):
    [request] = make.requests(make.parse_args(argv, "lods make"))
    words = shlex.split(request.command)
    assert words[:2] == ["lods", "make"]
    assert make.requests(make.parse_args(words[2:], "lods make")) == [request]


def test_what_a_run_was_paused_for_is_no_time_of_the_object(trained):
    assert cli.main(["make", "a red armchair"]) == 0
    [request] = make.requests(make.parse_args(["a red armchair"], "lods make"))
    [run] = (FOLDER / "run").iterdir()
    now = datetime.now().replace(microsecond=0)
    entry = {"started": now.isoformat(), "seconds": 9, "paused": 70.5}
    for trainings, since, paused in (
        ([entry], now.timestamp(), 70.5),
        ([entry], now.timestamp() + 60, 0),  # of an earlier attempt
        ([entry, {"started": now.isoformat()}], now.timestamp(), 0),
        ([{**entry, "paused": "x"}], now.timestamp(), 0),
        ([], now.timestamp(), 0),
    ):
        (run / "run.json").write_text(json.dumps({"trainings": trainings}))
        assert job.paused_in(request, FOLDER, since) == paused


def test_what_is_made_is_not_made_again(trained):
    assert cli.main(["make", "a red armchair"]) == cli.main(["make", "a red armchair"]) == 0
    assert len(trained.words) == 2


def test_other_settings_are_made_anew_beside_the_old_run(trained):
    for more in ([], ["--steps", "9"]):
        assert cli.main(["make", "a red armchair", *more]) == 0
    assert len(list((FOLDER / "run").iterdir())) == 2


def test_a_stopped_make_goes_on_from_its_checkpoint(trained, capsys):
    trained.statuses[:] = [143]
    assert cli.main(["make", "a red armchair"]) == 143
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "the same command goes on: lods make 'a red armchair'"
    assert cli.main(shlex.split(last.split(": ")[1])[1:]) == 0
    [run] = (FOLDER / "run").iterdir()
    assert f"resume={run}/ckpts/last.ckpt" in trained.words[1] and "--train" in trained.words[1]


def test_a_failed_make_is_tried_again_and_its_status_is_told(trained):
    trained.statuses[:] = [2]
    assert cli.main(["make", "a red armchair"]) == 2
    assert json.loads((FOLDER / "job.json").read_text())["state"] == "failed"
    assert cli.main(["make", "a red armchair"]) == 0


def test_the_status_names_what_is_done_and_what_was_stopped(trained, capsys):
    assert cli.main(["make", "a red armchair"]) == 0
    trained.statuses[:] = [130]
    assert cli.main(["make", "a blue car"]) == 130
    capsys.readouterr()
    assert cli.main(["make", "--status"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[:4] for row in rows] == [
        ["a", "blue", "car", "stopped"],
        ["a", "red", "armchair", "done"],
    ]


def test_a_request_that_is_damaged_hides_no_other(trained, capsys):
    assert cli.main(["make", "a red armchair"]) == 0
    for name, text in (("x", "["), ("y", '{"prompt": 3}'), ("z", "[" * 9999)):
        (FOLDER.parent / name).mkdir()
        (FOLDER.parent / name / "request.json").write_text(text)
    capsys.readouterr()
    assert cli.main(["make", "--status"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.slow
def test_two_prompts_are_made_in_processes_of_their_own(away):
    prompts = ("a red armchair", "a blue car")
    done = lods("make", *prompts, *tiny(2), "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    for prompt in prompts:
        folder = FOLDER.parent / f"{prompt.replace(' ', '_')}-gaussians-lods-embedding"
        assert {p.name for p in folder.iterdir()} >= {"picture.png", "video.mp4", "gaussians.ply"}
        assert re.search(rf"{prompt} +done", done.stdout)


@pytest.mark.slow
def test_a_killed_batch_goes_on_where_it_was(away):
    argv = ["make", "a red armchair", *tiny(400), "checkpoint.every_n_train_steps=2"]
    process = subprocess.Popen(command(*argv, "--workers", "1"), cwd=away, env=environment())
    try:
        wait_for(lambda: list(FOLDER.glob("run/*/ckpts/last.ckpt")))
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    [last] = FOLDER.glob("run/*/ckpts/last.ckpt")
    wait_for(lambda: "interrupted at step" in (FOLDER / "log.txt").read_text())
    at = int(re.search(r"interrupted at step (\d+)", (FOLDER / "log.txt").read_text())[1])
    assert "stopped" in lods("make", "--status").stdout
    again = [*argv, "--workers", "1"]
    again = subprocess.Popen(command(*again), cwd=away, env=environment(), stdout=subprocess.PIPE)
    try:
        wait_for(
            lambda: (FOLDER / "log.txt").read_text().count("at step") > 1 or at_step(last) > at
        )
    finally:
        again.terminate()
        again.communicate()
    assert again.returncode == 130 and at_step(last) > at


def at_step(checkpoint):
    import torch

    return torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"]


def wait_for(true, seconds=240):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)


def tiny(steps):
    """Settings that make an object in seconds."""
    own = ("prompt=", "pretrained_model", "use_timestamp", "tag=", "trainer.max_steps")
    settings = [word for word in small_run("") if not any(name in word for name in own)]
    more = ["system.geometry.ball.n_points=50", "system.exporter.mesh_resolution=8"]
    more.append("system.exporter.texture_size=64")
    return [*settings, *more, "--steps", str(steps)]


def command(*argv):
    return [sys.executable, "-m", "lods", *argv]


def environment():
    return os.environ | {"PYTHONPATH": str(LIBRARY), "OMP_NUM_THREADS": "1"}


def lods(*argv):
    return subprocess.run(command(*argv), capture_output=True, text=True, env=environment())
