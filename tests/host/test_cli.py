"""The command ``lods``: what each word calls, which run is meant, and what it refuses."""

from pathlib import Path

import pytest
from lods import __version__, cli, host
from lods.commands import doctor, runs

from tests.host.commands import away, called, refused
from tests.run_folders import make_run

__all__ = ["away", "called"]  # fixtures

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
            ["--export", "system.turntable=[frames,webp]", "system.exporter.fmt=spz"],
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


def test_where_an_export_cannot_be_copied_it_is_said_where_it_is(away, monkeypatch, capsys):
    run = make_run(away / "outputs" / "gs" / "a_car")
    export = run / "save" / "it4-export"
    export.mkdir(parents=True)
    monkeypatch.setattr(runs, "start", lambda words: (export / "g.glb").write_text("glb") and 0)
    (away / "taken" / "g.glb").mkdir(parents=True)
    line = refused(capsys, "export", "a_car", "--format", "glb", "--out", "taken")
    assert line.startswith("--out taken: not all could be copied there (taken/g.glb: Is a dir")
    assert line.endswith("; the files are in outputs/gs/a_car/save/it4-export")
    assert (export / "g.glb").read_text() == "glb"


@pytest.mark.parametrize(
    "command", [("resume",), ("test",), ("export", "--format", "glb"), ("edit",)]
)
def test_a_text_that_is_too_long_for_a_name_is_one_line(capsys, command):
    line = refused(capsys, command[0], "x" * 5000, *command[1:])
    assert line.endswith("xxx: File name too long") and len(line) < 400


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
