"""report.html: what it tells of a run, and what it never does."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from tests.host.run_pages import EVIL, Page, run
from tests.host.test_launch import cli, last, train
from tests.run_folders import PROMPT, run_folder
from threestudio.run.page import curves, write_page
from threestudio.run.page.facts import read_facts
from threestudio.run.record import read_record

__all__ = ["cli", "run"]  # fixtures


def test_the_facts_are_those_of_the_run(run):
    page = Page(write_page([run]))
    rows = page.rows()
    assert page.all("h1")[0][2] == PROMPT
    told = {"method": "lods-embedding", "representation": "lods-gaussians", "seed": "3"}
    told |= {"guidance scale": "7.5", "model": "pocket-shapes", "steps": "30"}
    told |= {"object": "40 Gaussians", "training": "12.5 s", "on": "a processor, 2 threads"}
    told |= {"begun": "2026-11-28 21:40:11", "what": "learnable embedding, 4 × 6"}
    told |= {"learned on": "pocket-shapes", "has moved by": "12.5 % (|e - e0| / |e0|)"}
    assert told.items() <= rows.items()
    assert rows["size"].startswith("24 numbers, ")
    assert "torch 2.13.0, numpy 2.4.6" in page.text


def test_it_loads_nothing_and_its_policy_allows_nothing_else(run):
    page = Page(write_page([run]))
    for _, attributes, _ in page.elements:
        assert attributes.get("src", "data:").startswith("data:image/webp;base64,") or (
            "src" not in attributes
        )
        assert attributes.get("href", "./").startswith("./")
        assert not {"style", "srcset", "action", "poster"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert not page.all("link") and not page.all("iframe")
    assert "http://" not in page.html and "https://" not in page.html
    [policy] = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.split(" ", 1) for rule in policy[1]["content"].split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for name, of in (("script", "script-src"), ("style", "style-src")):
        [inline] = [e for e in page.all(name) if e[1].get("type", "module") == "module"]
        digest = base64.b64encode(hashlib.sha256(inline[2].encode()).digest()).decode()
        assert rules[of] == f"'sha256-{digest}'"  # of that one, and of no other


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_its_script_is_one_valid_module(run, tmp_path):
    """Two files are put together, which may not declare the same name."""
    [script] = Page(write_page([run])).all("script", type="module")
    (tmp_path / "page.mjs").write_text(script[2])
    words = ["node", "--check", str(tmp_path / "page.mjs")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "class Viewer" in script[2] and "new Viewer(" in script[2]


def test_its_links_lead_to_the_files_of_the_run(run, tmp_path):
    (run / "save/it30-export/a b#?%.glb").write_bytes(b"")
    for target in (None, tmp_path / "elsewhere" / "page.html"):
        path = write_page([run], target)
        links = [e[1]["href"] for e in Page(path).all("a")]
        files = [os.path.normpath(path.parent / unquote(link)) for link in links]
        assert len(files) == 7 and all(map(os.path.isfile, files))
        assert str(run / "save/it30-test.mp4") in files
        assert str(run / "save/it30-export/a b#?%.glb") in files


def test_the_curves_are_those_of_the_log(run):
    more = run / "csv_logs/version_1/metrics.csv"  # of a training that went on from step 20
    more.parent.mkdir()
    more.write_text("step,train/loss,lr-Adam\n29,1.5,nan\n39,0.5,1e-3\nx,3,\n")
    found = read_facts(run).curves
    assert found["train/loss"] == [(9, 4.0), (19, 2.5), (29, 1.5), (39, 0.5)]
    assert found["lr-Adam"] == [(39, 1e-3)]
    page = Page(write_page([run]))
    labels = [e[1].get("aria-label") for e in page.all("svg")]
    assert labels == ["loss: from 4 to 0.5"]
    assert "Constant: n gaussians 40" in page.text


def test_a_line_of_a_plot_goes_where_the_values_are():
    svg = curves.plot("train/loss", [("", [(0, 2.0), (50, 4.0), (100, 3.0)])])
    points = re.search(r'points="([^"]*)"', svg)[1].split()
    x, y = zip(*(map(float, point.split(",")) for point in points))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])
    assert y[0] - y[1] == pytest.approx(2 * (y[2] - y[1]), abs=0.2)  # up is less


def test_long_curves_keep_their_mean():
    curve = [(i, float(i % 7)) for i in range(10_000)]
    thin = curves.thinned(curve)
    assert len(thin) == curves.MAX_POINTS
    assert np.mean([v for _, v in thin]) == pytest.approx(np.mean([v for _, v in curve]), abs=0.01)


def test_settings_that_are_not_the_default_are_told_with_it(run):
    page = Page(write_page([run]))
    cells = [[e[2] for e in page.elements if e[0] == "td"][i : i + 3] for i in range(200)]
    assert ["seed", "3", "0"] in cells
    assert ["trainer.max_steps", "30", "-1"] in cells  # Lightning's
    assert ["data.eval_width", "64", "—"] in cells  # nobody declares it here
    [keys] = [[e[2] for e in page.elements if e[0] == "td"][:2]]
    assert keys == ["system.prompt_processor.prompt", PROMPT]  # of the command


def test_it_tells_the_command_and_the_one_that_repeats_it(run):
    page = Page(write_page([run]))
    made, again = (e[2] for e in page.all("pre", **{"class": "command"}))
    assert made == (run / "cmd.txt").read_text().partition("\n")[0]
    wanted = ["python", "launch.py", "--config", f"{run}/configs/parsed.yaml", "--train"]
    assert shlex.split(again) == [*wanted, "--gpu", "0"]


def test_what_was_changed_on_the_way_is_told_and_repeated(run):
    lines = [{"step": 12, "what": "prompt", "old": "a cat", "new": EVIL}, {"step": 3}]
    text = "\n".join(map(json.dumps, lines)) + "\nnothing\n"
    (run / "interventions.jsonl").write_text(text)
    page = Page(write_page([run]))
    cells = [e[2] for e in page.elements if e[0] == "td"]
    assert cells[-4:] == ["12", "prompt", "a cat", EVIL]
    again = shlex.split(page.all("pre", **{"class": "command"})[1][2])
    assert again[-2:] == ["--replay", f"{run}/interventions.jsonl"]


def test_previews_are_the_first_panels_in_the_order_of_their_steps(run):
    page = Page(write_page([run]))
    assert [e[2] for e in page.all("figcaption")][:2] == ["step 10", "step 20"]
    strip = [e[1] for e in page.all("img") if "at step" in e[1]["alt"]]
    assert [(e["width"], e["height"]) for e in strip] == [("64", "64"), ("64", "64")]


def test_several_runs_stand_side_by_side_with_what_they_differ_in(tmp_path):
    runs = [run_folder(tmp_path / "one", seed=1), run_folder(tmp_path / "two", seed=2)]
    page = Page(write_page(runs, tmp_path / "both.html"))
    ids = [e[1]["data-object"] for e in page.all("div") if "data-object" in e[1]]
    assert ids == ["object-0", "object-1"] and all(page.all("script", id=i) for i in ids)
    assert [e[2] for e in page.all("h3")] == [f"{PROMPT} (one)", f"{PROMPT} (two)"]
    cells = [e[2] for e in page.elements if e[0] == "td"]
    assert cells[cells.index("seed") :][:3] == ["seed", "1", "2"]
    assert "system.guidance.guidance_scale" not in cells  # the same in both
    assert cells.count("seed") == 1 and "method" not in cells
    assert "The same in all: method lods-embedding, " in page.text
    assert len(page.all("polyline", **{"class": "line1"})) == 2  # of the plot and of its key


def test_runs_of_one_name_are_called_after_the_folders_that_they_are_in(tmp_path):
    runs = [run_folder(tmp_path / folder / "run" / "1f") for folder in ("red", "red-2")]
    page = Page(write_page(runs, tmp_path / "both.html"))
    assert [e[2] for e in page.all("h3")] == [f"{PROMPT} (red)", f"{PROMPT} (red-2)"]


def test_what_was_changed_on_the_way_is_told_beside_the_object(run):
    line = '{"step": %d, "what": "prompt", "old": "a", "new": "a snowman"}\n'
    (run / "interventions.jsonl").write_text("".join(line % step for step in range(5)))
    told = Page(write_page([run])).rows()["changed on the way"]
    assert told.startswith("prompt to a snowman before step 0; ") and told.endswith("; 2 more")


# --- in a run -----------------------------------------------------------------------------------


def test_a_run_ends_with_its_page(cli):
    status, out, _ = train(cli)
    page = Page(Path("outputs/toy/p/report.html"))
    assert status == 0 and "  page: outputs/toy/p/report.html\n" in out
    assert page.rows()["steps"] == "4"
    command = page.all("pre", **{"class": "command"})[0][2]
    assert command == Path("outputs/toy/p/cmd.txt").read_text().partition("\n")[0]
    cells = [e[2] for e in page.elements if e[0] == "td"]
    assert cells[:2] == ["system.prompt", "p"]
    assert f"torch {version('torch')}" in page.text


def test_a_page_shows_the_command_that_was_typed_and_how_long_it_was_paused(tmp_path):
    run = run_folder(tmp_path / "r")
    record = json.loads((run / "run.json").read_text())
    record["trainings"][0] |= {"asked": "lods make 'a <b>car</b>'", "seconds": 60, "paused": 300}
    (run / "run.json").write_text(json.dumps(record))
    page = Page(write_page([run]))
    commands = [text for _, _, text in page.all("pre", **{"class": "command"})]
    assert commands[0] == "lods make 'a <b>car</b>'"
    assert commands[1] == (run / "cmd.txt").read_text().partition("\n")[0]
    assert page.rows()["training"] == "60 s, and 5 min paused"


def test_the_command_that_repeats_a_run_repeats_it(cli):
    assert train(cli, "trainer.max_steps=3", "seed=5")[0] == 0
    page = Page(Path("outputs/toy/p/report.html"))
    again = shlex.split(page.all("pre", **{"class": "command"})[1][2])
    assert again[:2] == ["python", "launch.py"]
    kept = [word for word in again[2:] if word not in ("--extensions", "custom")]
    assert cli(*kept)[0] == 0
    losses = [read_facts(f"outputs/toy/{name}").curves["train/loss_toy"] for name in ("p", "p-002")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_run_is_recorded_with_each_of_its_trainings(cli):
    assert train(cli)[0] == 0
    assert train(cli, "resume=outputs/toy/p", "trainer.max_steps=6")[0] == 0
    record = read_record("outputs/toy/p")
    assert [(t["from_step"], t["to_step"]) for t in record] == [(0, 4), (4, 6)]
    for training in record:
        assert training["device"] == "cpu" and training["seconds"] >= 0
        assert training["versions"]["torch"] == version("torch")


def test_a_page_that_is_not_wanted_is_not_made(cli):
    status, out, _ = train(cli, "report=false")
    assert status == 0 and "page" not in out
    assert not Path("outputs/toy/p/report.html").exists()


def test_a_run_whose_page_cannot_be_made_is_a_good_run(cli, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("kaputt")

    monkeypatch.setattr("threestudio.run.page.read_facts", fail)
    status, out, err = train(cli)
    assert status == 0 and "no report.html: kaputt" in caplog.text
    assert "Traceback" not in err and "page" not in out and Path(last()).is_file()
