"""Folders of runs, good and damaged ones."""

import json
import os

import pytest
from lods.studio.progress import log_end
from lods.studio.shelf import Shelf

from tests.studio.toy import REQUEST


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "runs")


def states(shelf):
    return {entry.name: entry.state for entry in shelf.entries()}


def test_names_are_plain_and_no_two_runs_share_one(shelf):
    from dataclasses import replace

    prompts = ["../../etc/passwd", "a red car", "a red car", "香蕉", "x" * 300, "..."]
    names = [shelf.create(replace(REQUEST, prompt=prompt), "") for prompt in prompts]
    assert names == ["etc-passwd", "a-red-car", "a-red-car-2", "run", "x" * 48, "run-2"]
    assert [shelf.find(name).request.prompt for name in names] == prompts


@pytest.mark.parametrize("name", ["studio.json", "request.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 9999, b'{"turn": 1e400}'])
def test_a_damaged_run_is_shown_as_one_and_the_others_as_ever(shelf, name, content):
    good, bad = shelf.create(REQUEST, ""), shelf.create(REQUEST, "")
    (shelf.root / bad / name).write_bytes(content)
    assert states(shelf) == {good: "queued", bad: "damaged"}
    assert name in shelf.find(bad).error


@pytest.mark.parametrize("name", ["job.json", "process.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b'{"pid": "1", "attempt": 1}', b"\xff"])
def test_a_damaged_note_of_a_process_counts_as_none(shelf, name, content):
    run = shelf.create(REQUEST, "")
    (shelf.root / run / name).write_bytes(content)
    assert states(shelf) == {run: "queued"}


def test_pipes_links_and_hidden_folders_are_no_runs(shelf, tmp_path):
    real = shelf.create(REQUEST, "")
    (tmp_path / "elsewhere").mkdir()
    (shelf.root / real).joinpath("request.json").rename(tmp_path / "elsewhere" / "request.json")
    (shelf.root / "link").symlink_to(tmp_path / "elsewhere")
    (shelf.root / ".hidden").mkdir()
    (shelf.root / ".hidden" / "request.json").write_text("{}")
    (shelf.root / "pipe").mkdir()
    os.mkfifo(shelf.root / "pipe" / "request.json")
    (shelf.root / "file").write_text("")
    (shelf.root / "borrowed").mkdir()
    (shelf.root / "borrowed" / "request.json").symlink_to(tmp_path / "elsewhere" / "request.json")
    assert states(shelf) == {real: "damaged"}


@pytest.mark.parametrize("name", ["..", ".", "", "/etc", "a-red-car/..", "a-red-car\0", ".studio"])
def test_a_name_is_looked_up_and_never_made_a_path(shelf, name):
    shelf.create(REQUEST, "")
    assert shelf.find(name) is None


def test_files_that_links_lead_to_are_not_handed_out(shelf, tmp_path):
    name = shelf.create(REQUEST, "")
    secret, folder = tmp_path / "secret.ply", shelf.root / name
    secret.write_text("secret")
    (folder / "gaussians.ply").symlink_to(secret)
    (folder / "object.glb").write_text("glb")
    (tmp_path / "run").mkdir()
    (folder / "run").symlink_to(tmp_path / "run")
    preview = tmp_path / "run" / REQUEST.key / "save"
    preview.mkdir(parents=True)
    (preview / "it10-0.png").write_text("png")
    assert set(shelf.files(shelf.find(name))) == {"glb"}


def test_of_several_plys_the_gaussians_that_can_be_drawn_are_handed_out(shelf):
    name = shelf.create(REQUEST, "")
    for ply in ("gaussians.ply", "gaussians-points.ply", "gaussians.compressed.ply"):
        (shelf.root / name / ply).write_text("ply")
    assert shelf.files(shelf.find(name))["ply"].name == "gaussians.ply"


def test_the_newest_preview_is_the_first_view_of_the_last_step(shelf):
    name = shelf.create(REQUEST, "")
    save = shelf.root / name / "run" / REQUEST.key / "save"
    save.mkdir(parents=True)
    for file in ("it90-0.png", "it100-0.png", "it100-test-sheet.png", "it20-0.png"):
        (save / file).touch()
    assert shelf.files(shelf.find(name))["preview"].name == "it100-0.png"


def test_runs_of_lods_make_and_of_lods_train_are_shown(shelf):
    made, trained = shelf.root / "made", shelf.root / "trained"
    (trained / "configs").mkdir(parents=True)
    (trained / "save").mkdir()
    made.mkdir()
    (made / "request.json").write_text(json.dumps(REQUEST.plain()))
    job = {"key": REQUEST.key, "state": "done", "error": "", "seconds": 12.5}
    (made / "job.json").write_text(json.dumps(job))
    (trained / "configs" / "parsed.yaml").write_text(
        "seed: 4\nsystem: {geometry_type: lods-gaussians, guidance_type: lods-sds-guidance, "
        "prompt_processor: {prompt: a mug, pretrained_model_name_or_path: "
        "custom/threestudio-lods/lods/models/pocket-shapes}}"
    )
    (trained / "save" / "it30-test.mp4").touch()
    assert states(shelf) == {"made": "done", "trained": "done"}
    found = shelf.find("trained").request
    assert (found.prompt, found.on, found.method) == ("a mug", "gaussians", "lods-sds")
    assert (found.model, found.seed) == ("pocket-shapes", 4)


def test_what_a_killed_server_has_left_half_made_is_swept_away(shelf):
    name = shelf.create(REQUEST, "")
    for left in (".new-0123456789abcdef", ".gone-0123456789abcdef"):
        (shelf.root / left).mkdir()
    (shelf.root / ".other").mkdir()
    shelf.sweep()
    assert sorted(path.name for path in shelf.root.iterdir()) == [".other", name]


def test_a_line_that_was_drawn_again_and_again_is_shown_once(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("x" * 9000 + "\nbegun\r\ntraining 1/9\rtraining 2/9\nend\n")
    assert log_end(log).splitlines()[1:] == ["begun", "training 2/9", "end"]


# --- folders of somebody else ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        ('{"trainings": [{"seconds": 1}, {"seconds": 90.5}]}', 90.5),
        ('{"trainings": []}', 0),
        ('{"trainings": [{"seconds": "x"}]}', 0),
        ('{"trainings": [{"seconds": NaN}]}', 0),
        ('{"trainings": [{"seconds": -3}]}', 0),
        ("[" * 99999, 0),
        ("", 0),
    ],
)
def test_how_long_a_run_was_trained_is_in_its_record(tmp_path, content, seconds):
    from lods.studio.progress import trained_for
    from lods.studio.shelf import Entry

    run = tmp_path / "run" / REQUEST.key
    run.mkdir(parents=True)
    entry = Entry("a", tmp_path, "make", "done", REQUEST)
    assert trained_for(entry) == 0
    (run / "run.json").write_text(content)
    assert trained_for(entry) == seconds


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-1", "1" + "0" * 400])
def test_a_job_of_senseless_length_hides_no_run(shelf, seconds):
    good, bad = shelf.create(REQUEST, ""), shelf.create(REQUEST, "")
    job = f'{{"key": "{REQUEST.key}", "state": "done", "error": "", "seconds": {seconds}}}'
    (shelf.root / bad / "job.json").write_text(job)
    assert states(shelf) == {good: "queued", bad: "done"} and shelf.find(bad).seconds == 0


@pytest.mark.parametrize("key", ["created", "turn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_times_that_are_no_numbers_are_damage(shelf, key, value):
    """NaN is no JSON: a browser would read nothing of the whole list."""
    name = shelf.create(REQUEST, "")
    note = shelf.root / name / "studio.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {key: value}))
    assert states(shelf) == {name: "damaged"}


def test_a_folder_that_fails_in_a_new_way_hides_no_other(shelf, monkeypatch):
    good, bad = shelf.create(REQUEST, ""), shelf.create(REQUEST, "")
    read = shelf._of_studio

    def fail(name, folder):
        if name == bad:
            raise ZeroDivisionError
        return read(name, folder)

    monkeypatch.setattr(shelf, "_of_studio", fail)
    assert states(shelf) == {good: "queued", bad: "damaged"}


def test_a_name_that_is_not_text_is_no_run(shelf):
    """No browser could ask for it, and a page that tries shows none of the others."""
    for name in ("café".encode("latin-1"), "café\u3000".encode()):
        folder = os.path.join(os.fsencode(shelf.root), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"request.json"), "w") as file:
            file.write(json.dumps(REQUEST.plain()))
    assert list(states(shelf)) == ["café\u3000"]


def test_a_saved_config_is_not_looked_up_in_this_machines_environment(shelf, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    configs = shelf.root / "trained" / "configs"
    configs.mkdir(parents=True)
    (configs / "parsed.yaml").write_text(
        "system: {guidance_type: lods-sds-guidance, prompt_processor: "
        "{prompt: '${oc.env:SECRET_KEY}', pretrained_model_name_or_path: pocket-shapes}}"
    )
    assert shelf.find("trained").request.prompt == "${oc.env:SECRET_KEY}"


def test_of_more_folders_than_are_shown_the_newest_are(shelf, monkeypatch):
    for k in range(4):
        (shelf.root / f"older-{k}").mkdir()
        os.utime(shelf.root / f"older-{k}", (k, k))
    monkeypatch.setattr("lods.studio.shelf.MAX_RUNS", 2)
    name = shelf.create(REQUEST, "")
    assert states(shelf) == {name: "queued"} and shelf.find(name)


def test_a_name_that_a_broken_link_has_is_taken(shelf, tmp_path):
    (shelf.root / "a-red-car").symlink_to(tmp_path / "nowhere")
    assert shelf.create(REQUEST, "") == "a-red-car-2"


def test_a_run_that_is_asked_for_after_the_clock_was_set_back_is_last(shelf, monkeypatch):
    first = shelf.create(REQUEST, "")
    monkeypatch.setattr("time.time", lambda: 1e9)
    second = shelf.create(REQUEST, "")
    assert shelf.find(first).wish.turn < shelf.find(second).wish.turn
