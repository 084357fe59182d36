"""report.html of runs that are damaged, hostile or very large."""

import importlib
import json
import os
import struct

import pytest

from tests.host.run_pages import EVIL, Page, run
from tests.run_folders import PROMPT, run_folder
from threestudio.run.page import curves, try_page, write_page
from threestudio.run.page.facts import read_facts
from threestudio.utils.errors import UserError

__all__ = ["run"]  # a fixture


def test_text_from_a_run_is_shown_as_text(tmp_path):
    run = run_folder(tmp_path / "r", prompt=EVIL, overrides=[f"tag={EVIL}"])
    entry = {"machine": EVIL, "versions": {EVIL: EVIL}, "started": EVIL}
    (run / "run.json").write_text(json.dumps({"trainings": [entry]}))
    log = run / "csv_logs/version_0/metrics.csv"
    log.write_text(log.read_text().replace("train/loss", "</svg><img src=x onerror=alert(2)>"))
    page = Page(write_page([run]))
    assert page.all("h1")[0][2] == EVIL and page.all("title")[0][2] == EVIL
    assert all(e[1]["src"].startswith("data:") for e in page.all("img"))
    kinds = [e[1].get("type") for e in page.all("script")]
    assert sorted(kinds) == ["application/octet-stream", "module"]
    assert not any(name.startswith("on") for e in page.elements for name in e[1])
    assert EVIL in page.rows()["on"]


def test_a_setting_is_not_looked_up_in_this_machines_environment(run, monkeypatch):
    monkeypatch.setenv("A_SECRET", "s3cret")
    config = run / "configs/parsed.yaml"
    config.write_text(config.read_text() + "note: ${oc.env:A_SECRET}\n")
    html = write_page([run]).read_text()
    assert "${oc.env:A_SECRET}" in html and "s3cret" not in html


DAMAGED = {
    "configs/parsed.yaml": b"{{{",
    "cmd.txt": b"\"'",
    "run.json": b"[1, 2",
    "csv_logs/version_0/metrics.csv": b"\0\xff\n,,,",
    "save/it30-test-sheet.png": b"\x89PNG nothing",
    "save/it30-test/0.png": b"",
    "save/it10-0.png": b"GIF89a",
    "save/it30-export/gaussians.ply": b"ply\nformat binary_little_endian 1.0\n"
    b"element vertex 9000000000\nproperty float f_dc_0\nend_header\n",
    "save/it30-export/prior.safetensors": struct.pack("<Q", 1 << 60),
}


@pytest.mark.parametrize("change", ["damaged", "missing", "a folder", "a link"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_part_that_is_damaged_or_missing_is_left_out(run, tmp_path, name, change):
    path = run / name
    path.unlink()
    if change == "damaged":
        path.write_bytes(DAMAGED[name])
    elif change == "a folder":
        path.mkdir()
    elif change == "a link":
        secret = tmp_path / "secret"
        yaml = name.endswith("yaml")
        secret.write_text("note: TOP SECRET\n" if yaml else "TOP SECRET\nNamespace(a=1)\n")
        path.symlink_to(secret)
    page = Page(write_page([run]))
    assert page.all("h1") and "SECRET" not in page.html
    if name != "configs/parsed.yaml":
        assert page.all("h1")[0][2] == PROMPT
    if name != "save/it30-export/gaussians.ply":
        assert page.all("script", id="object-0")


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    page = Page(write_page([tmp_path]))
    assert "There is no object to show" in page.text and "Left out: settings" in page.text


def test_a_page_that_fails_leaves_the_old_one(run, monkeypatch):
    path = write_page([run])
    before = path.read_bytes()
    page = importlib.import_module("threestudio.run.page")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_page([run])
    assert path.read_bytes() == before
    said = []
    monkeypatch.setattr(page.threestudio, "warn", said.append, raising=False)
    assert try_page(run) is None and len(said) == 1 and "No space left" in said[0]
    assert [p.name for p in run.iterdir() if "report" in p.name] == ["report.html"]


def test_a_file_that_is_no_page_is_not_replaced(run):
    (run / "report.html").write_text("<p>mine")
    with pytest.raises(UserError, match=r"report\.html is there and not a page"):
        write_page([run])
    assert (run / "report.html").read_text() == "<p>mine"


def test_more_runs_than_a_browser_draws_are_refused(tmp_path):
    with pytest.raises(UserError, match="1 to 12 runs, not 13"):
        write_page([tmp_path] * 13, tmp_path / "x.html")


def safetensors(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "a length that no float holds": (
        "run.json",
        b'{"trainings": [{"seconds": 1%s}]}' % (b"0" * 400),
    ),
    "what is no text": ("run.json", rb'{"trainings": [{"machine": "\ud800", "started": [1]}]}'),
    "a size that no text holds": (
        "save/it30-export/prior.safetensors",
        safetensors({"a": {"shape": [10**4000] * 2}}),
    ),
    "a view that no float holds": (
        "configs/parsed.yaml",
        b"data: {eval_fovy_deg: 1%s}\nsystem: {background: {color: [1%s]}}"
        % (b"0" * 399, b"0" * 399),
    ),
    "more columns than a plot": (
        "csv_logs/version_0/metrics.csv",
        b"step," + b",".join(b"c%d" % k for k in range(2000)) + b"\n" + b"1\n" * 9,
    ),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_told_is_left_out_and_the_rest_is_a_page(run, tmp_path, what, several):
    name, content = HOSTILE[what]
    (run / name).write_bytes(content)
    runs = [run, run_folder(tmp_path / "other")] if several else [run]
    page = Page(write_page(runs, tmp_path / "page.html"))
    assert page.all("script", type="application/octet-stream") and page.all("footer")
    if what not in ("what is no text", "a view that no float holds"):
        assert "Left out" in page.text


def test_a_long_log_is_thinned_over_all_of_its_steps(run, monkeypatch):
    monkeypatch.setattr(curves, "MAX_VALUES", 60)
    log = run / "csv_logs/version_0/metrics.csv"
    log.write_text("step,train/loss\n" + "".join(f"{k},{k}\n" for k in range(300)))
    steps = [step for step, _ in read_facts(run).curves["train/loss"]]
    assert len(steps) <= 30 and steps[0] == 0 and steps[-1] >= 285


def test_of_many_changes_the_first_are_listed(run, monkeypatch):
    monkeypatch.setattr("threestudio.run.page.sections.MAX_CHANGES", 2)
    line = {"step": 1, "what": "guidance_scale", "old": 1, "new": 2}
    (run / "interventions.jsonl").write_text(f"{json.dumps(line)}\n" * 5)
    assert "3 more are in interventions.jsonl" in Page(write_page([run])).text


def test_a_file_whose_name_is_not_text_is_linked_by_its_bytes(run):
    with open(os.fsencode(run / "save/it30-export") + b"/caf\xe9.glb", "wb"):
        pass
    page = Page(write_page([run]))
    assert any("caf%E9.glb" in e[1]["href"] for e in page.all("a"))
