"""The command ``lods``: what each word calls, what it refuses, and how ``make`` goes on."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import trimesh
from lods import __version__, cli, host
from lods.commands import doctor, job, make, runs
from lods.commands.job import Request
from lods.models import cards

from tests.runs import ROOT, small_run

LIBRARY = ROOT / "custom" / "threestudio-lods"
ARMCHAIR = {"prompt": "a red armchair", "model": "pocket", "small": True}


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """The tests run in an empty folder that is not the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *argv):
    """The one line with which a command line is refused."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    [line] = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def called(monkeypatch):
    """What the host is asked to do instead of doing it: ``(module, arguments)`` of each call."""
    calls, real = [], host.module

    def module(name):
        if name == "threestudio.run.viewer.options":
            return real(name)

        def main(*args, **kwargs):
            calls.append((name, args, kwargs))
            return 0

        return type("Module", (), {"main": staticmethod(main)})

    monkeypatch.setattr(host, "module", module)
    monkeypatch.setattr(cli, "_steady_streams", cli.contextlib.nullcontext)
    return calls


def make_run(folder, step=4):
    """The files by which a run is known."""
    for name, text in (("configs/parsed.yaml", "{}"), ("ckpts/last.ckpt", "x"), ("cmd.txt", "")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# --- the command itself ---------------------------------------------------------------------------


def test_the_help_names_every_command_and_fits_a_screen(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) < 85
    named = {line.split()[0] for line in lines if line.startswith("    ")}
    assert set(cli.COMMANDS) <= named


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lods {__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"), [("maek", "(did you mean 'make'?)"), ("xyzzy", ": they are make, train")]
)
def test_an_unknown_command_is_refused_with_the_nearest(capsys, word, hint):
    line = refused(capsys, word)
    assert line.startswith(f"lods has no command {word!r}") and hint in line


def test_no_command_shows_the_help_and_is_a_mistake(capsys):
    assert cli.main([]) == 2
    assert "usage: lods" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in cli.COMMANDS if c not in ("2d", "merge")])
def test_every_command_has_a_help_under_its_own_name(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lods {command} ")


def test_ctrl_c_before_a_run_begins_is_status_130(monkeypatch):
    def interrupted(argv, command):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupted)
    assert cli.main(["doctor"]) == 130


# --- what the commands call -----------------------------------------------------------------------


def test_train_is_the_launcher_and_trains_without_a_mode(called):
    words = ["--config", "lods-gs-lora", "seed=1"]
    assert cli.main(["train", *words]) == 0
    assert cli.main(["train", *words, "--validate"]) == 0
    known = {"prog": "lods train", "home": host.home()}
    assert called == [
        ("threestudio.run.cli", ([*words, "--train"],), known),
        ("threestudio.run.cli", ([*words, "--validate"],), known),
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["resume", "{run}", "trainer.max_steps=9"], ["--train", "trainer.max_steps=9"]),
        (["test", "{run}", "--gpu", "1"], ["--test", "--gpu", "1"]),
        (["export", "{run}", "--format", "glb"], ["--export", "system.exporter.fmt=glb"]),
        (
            ["export", "{run}", "--format", "[ply, splat]"],
            ["--export", "system.exporter.fmt=[ply,splat]"],
        ),
        (
            ["export", "{run}", "--format", "webp"],
            ["--export", "system.turntable=webp", "system.export_object=false"],
        ),
        (
            ["export", "{run}", "--format", "frames,spz,webp"],
            ["--export", "system.turntable=both", "system.exporter.fmt=spz"],
        ),
    ],
)
def test_a_run_goes_on_with_its_own_settings(called, away, argv, words):
    run = make_run(away / "outputs" / "gs" / "tag")
    assert cli.main([word.format(run=run) for word in argv]) == 0
    [(module, (given,), _)] = called
    assert module == "threestudio.run.cli"
    assert given == ["--config", f"{run}/configs/parsed.yaml", f"resume={run}", *words]


def test_compare_is_the_evaluation_with_grids_by_name(called):
    assert cli.main(["compare", "quick", "--dry-run"]) == 0
    grid = str(host.home() / "evaluation" / "grids" / "quick.yaml")
    assert called == [
        ("evaluation.command", ([grid, "--dry-run"],), {"prog": "lods compare"}),
    ]


def test_compare_writes_the_report(called):
    assert cli.main(["compare", "report", "--folder", "x"]) == 0
    assert called == [("evaluation.report", (["--folder", "x"], "lods compare report"), {})]


def test_an_unknown_grid_is_refused_with_the_nearest(capsys):
    assert refused(capsys, "compare", "quik") == "there is no grid 'quik' (did you mean 'quick'?)"


def test_2d_is_the_playground(monkeypatch):
    calls = []
    monkeypatch.setattr("lods.playground.main", lambda *args: calls.append(args) or 0)
    assert cli.main(["2d", "lora", "--steps", "3"]) == 0
    assert calls == [("lora", ["--steps", "3"], "lods 2d lora")]


def test_2d_refuses_another_kind(capsys):
    assert "'lola'" in refused(capsys, "2d", "lola")


def test_merge_writes_one_yaml(away):
    (away / "a.yaml").write_text("one: 1\ntwo: 2\n")
    assert cli.main(["merge", "a.yaml", "two=3", "-o", "b.yaml"]) == 0
    assert (away / "b.yaml").read_text().endswith("one: 1\ntwo: 3\n")


# --- which run is meant ---------------------------------------------------------------------------


def test_a_run_is_found_by_its_folder_its_checkpoint_and_a_piece_of_its_name(away):
    run = make_run(away / "outputs" / "gs" / "a_armchair@1")
    make_run(away / "outputs" / "gs" / "a_car@2")
    relative = Path("outputs/gs/a_armchair@1")
    assert runs.find_run(str(run)).folder == run
    assert runs.find_run("armch").folder == relative
    assert runs.find_run("a armchair").folder == relative  # as in the prompt
    found = runs.find_run("outputs/gs/a_armchair@1/ckpts/last.ckpt")
    assert found.folder == relative and found.checkpoint == relative / "ckpts" / "last.ckpt"


def test_the_run_of_lods_make_is_found_by_the_folder_around_it(away):
    run = make_run(away / "outputs/make/a_car-gaussians-lods-sds/run/12345678")
    assert runs.find_run("outputs/make/a_car-gaussians-lods-sds").folder.resolve() == run
    assert runs.find_run("a_car-gauss").folder.resolve() == run


def test_a_piece_of_several_names_is_refused_with_the_runs(away, capsys):
    for name in ("a_red_car", "a_blue_car"):
        make_run(away / "outputs" / "gs" / name)
    line = refused(capsys, "test", "car")
    assert "2 runs, name one: " in line and "outputs/gs/a_red_car" in line


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("a_carr", "there is no run 'a_carr', here or below outputs (did you mean 'a_car'?)"),
        ("empty", "empty is not the folder of a run: there is no configs/parsed.yaml in it"),
        ("loose.ckpt", "loose.ckpt is not a checkpoint in the folder ckpts of a run"),
    ],
)
def test_what_is_no_run_is_refused(away, capsys, word, text):
    make_run(away / "outputs" / "gs" / "a_car")
    (away / "empty").mkdir()
    (away / "loose.ckpt").write_text("x")
    assert refused(capsys, "resume", word) == text


def test_a_word_that_is_no_setting_is_refused(capsys):
    assert "'fast' is not written KEY=VALUE" in refused(capsys, "resume", "run", "fast")


def test_exported_files_are_copied_where_they_are_asked_for(away, monkeypatch):
    run = make_run(away / "outputs" / "gs" / "a_car")
    old, new = (run / "save" / "it4-export" / name for name in ("old.ply", "new.glb"))
    old.parent.mkdir(parents=True)
    old.write_text("old")
    monkeypatch.setattr(runs, "start", lambda words: new.write_text("new") and 0)
    assert cli.main(["export", "a_car", "--format", "glb", "--out", "there"]) == 0
    assert [path.name for path in Path("there").iterdir()] == ["new.glb"]


def test_exported_frames_are_copied_into_a_folder_of_their_own(away, monkeypatch):
    run = make_run(away / "outputs" / "gs" / "a_car")
    folder = run / "save" / "it4-export" / "frames"

    def export(words):
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.png").write_text("png")
        (folder.parent / "turntable.webp").write_text("webp")
        return 0

    monkeypatch.setattr(runs, "start", export)
    assert cli.main(["export", "a_car", "--format", "frames,webp", "--out", "there"]) == 0
    assert sorted(path.name for path in Path("there").iterdir()) == ["frames", "turntable.webp"]
    assert len(list(Path("there/frames").iterdir())) == 3


def test_an_empty_format_is_refused(capsys, away):
    make_run(away / "outputs" / "gs" / "a_car")
    assert "--format is empty" in refused(capsys, "export", "a_car", "--format", "[]")


# --- make: what is asked for ----------------------------------------------------------------------


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


# --- make: a mesh that is there -------------------------------------------------------------------


def write_box(path):
    """A mesh without a texture."""
    trimesh.creation.box((1.0, 1, 1)).export(path)
    return path


def test_a_mesh_that_is_there_is_what_a_run_begins_with(away):
    """By whatever path; its folder is named after it, and what it holds is part of what is asked
    for."""
    box = write_box(away / "my 'box'.stl")
    argv = ["a red armchair", "--on", "mesh", "--from", box.name, "--model", "pocket"]
    [request] = make.requests(make.parse_args(argv, "lods make"))
    words = request.words(Path("x"))
    assert words[:3] == ["--config", "lods-mesh-embedding", "pocket-mesh"]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert given["system.geometry.init_type"] == "file"
    assert given["system.geometry.file.path"] == str(away / "my 'box'.stl")
    folder = make.folder_of(request, Path("out")).name
    assert folder.startswith("a_red_armchair-mesh-my") and folder.endswith("-lods-embedding")
    trimesh.creation.box((1.0, 2, 1)).export(box)
    [changed] = make.requests(make.parse_args(argv, "lods make"))
    assert changed.source == request.source and changed.key != request.key
    words = shlex.split(changed.command)
    assert make.requests(make.parse_args(words[2:], "lods make")) == [changed]


def test_the_surface_of_a_run_is_a_mesh_to_begin_with(away, monkeypatch):
    """It is exported first where it is not yet there."""
    run, started = make_run(away / "outputs" / "lods-gs" / "a_car"), []

    def start(words):
        started.append(words)
        (run / "save/it4-export").mkdir(parents=True)
        write_box(run / "save/it4-export/gaussians.glb")
        return 0

    monkeypatch.setattr(runs, "start", start)
    argv = ["a red armchair", "--on", "mesh", "--from", "a_car", "--model", "pocket"]
    for _ in range(2):
        [request] = make.requests(make.parse_args(argv, "lods make"))
        assert request.source == str(run / "save/it4-export/gaussians.glb")
    assert len(started) == 1 and started[0][-2:] == ["--export", "system.exporter.fmt=glb"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--on", "mesh"], "name it by --from FILE"),
        (["--on", "mesh", "--from", "none.glb"], "there is no file"),
        (["--on", "mesh", "--from", "list.txt"], "is of no known format"),
        (["--on", "mesh", "--from", "nothing"], "there is no run 'nothing'"),
        (["--on", "mesh", "--from", "bad.obj"], "--from bad.obj: "),
        (["--on", "mesh", "--from", "${seed}.stl"], "take for a reference"),
        (["--from", "box.stl"], "Gaussians begin with a file by system.geometry.init_type=file"),
        (["--on", "nerf", "--from", "box.stl"], "--from is of --on mesh, and this is --on nerf"),
    ],
)
def test_a_mesh_that_cannot_be_had_is_one_line(away, capsys, monkeypatch, argv, said):
    monkeypatch.setattr(job, "start", lambda words: pytest.fail("it has begun"))
    write_box(away / "box.stl")
    (away / "list.txt").write_text("a car")
    (away / "bad.obj").write_text("f 1 2 9\nv 0 0 0\n")
    assert said in refused(capsys, "make", "a red armchair", "--model", "pocket", *argv)
    assert not Path("outputs").exists()


# --- make: how it goes on -------------------------------------------------------------------------


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


# --- doctor ---------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)


def test_doctor_names_every_rasteriser_and_every_card_without_the_network(offline, capsys):
    from lods.gaussians.backends import backend_names

    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not [f for f in found if f["name"] == "error"]
    states = {f["name"]: f["state"] for f in found}
    assert all("\n" not in state and state for state in states.values())
    assert {f"rasteriser {n}" for n in backend_names()} - set(states) <= {
        "rasteriser auto",
        "rasteriser torch",
    }
    assert set(cards.all_cards()) <= set(states)
    assert states["rasteriser cpu"] == "ready" == states["pocket-shapes"].split(" (")[0]


def test_doctor_tells_how_a_card_is_downloaded(offline, monkeypatch):
    monkeypatch.setattr(cards, "is_here", lambda name: False)
    states = dict(doctor._models())
    [first, *_] = cards.find_card("sd15").ids
    assert states["sd15"].startswith(f"not downloaded: hf download {first}; for GPUs of 8 GB")


def test_a_part_that_fails_hides_no_other(monkeypatch):
    def broken():
        raise RuntimeError("no\ndriver")
        yield

    monkeypatch.setattr(doctor, "_machine", broken)
    found = doctor.examine()
    assert found[0].state == "RuntimeError: no driver" and found[-1].group == "models"


def test_a_reason_of_a_backend_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr("lods.gaussians.backends.gsplat.missing", lambda: "no\n  kernels; do this")
    assert dict(doctor._rasterisers())["rasteriser gsplat"] == "no kernels; do this"


# --- pages ----------------------------------------------------------------------------------------


def test_a_page_of_one_run_is_in_its_folder_and_of_several_in_this_one(away, capsys):
    for name in ("a_mushroom@1", "a_car@2"):
        make_run(away / "outputs" / "gs" / name)
    assert cli.main(["report", "mushroom"]) == 0
    assert capsys.readouterr().out == "outputs/gs/a_mushroom@1/report.html\n"
    assert cli.main(["report", "mushroom", "car", "mushroom"]) == 0
    assert "2 runs side by side" in Path("report.html").read_text()
    assert cli.main(["report", "mushroom", "car", "--out", "pages/two.html"]) == 0
    assert "2 runs side by side" in Path("pages/two.html").read_text()


def test_a_page_is_refused_before_anything_is_read(away, capsys):
    make_run(away / "outputs" / "gs" / "a_car@2")
    Path("mine.html").write_text("mine")
    assert "mine.html is there and not a page" in refused(
        capsys, "report", "car", "--out", "mine.html"
    )
    assert "a page ends in .html" in refused(capsys, "report", "car", "--out", "mine.txt")
    assert "there is no run 'bike'" in refused(capsys, "report", "bike")
    assert Path("mine.html").read_text() == "mine"
