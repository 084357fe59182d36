"""The controls of the live view, the texts in them, and the options of the command line."""

import contextlib
import gzip
import re
import string
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("viser", reason="viser is not installed (the extra 'viewer')")

from lods import cli

from tests.host import test_gs_system
from tests.host.live_views import At, Heard, arrived, until, viewer
from tests.run_folders import make_run
from tests.runs import fit
from threestudio.run.interrupt import InterruptGuard
from threestudio.run.interventions import PROMPT, Change
from threestudio.run.record import RunRecord, read_record
from threestudio.run.viewer import options, phone, server
from threestudio.run.viewer.panel import Panel, as_text
from threestudio.utils.errors import UserError

small = test_gs_system.small  # a fixture


def test_a_paused_run_waits_and_a_request_to_stop_ends_the_pause(small):
    guard = InterruptGuard()
    guard.training = True
    view, waited = viewer(guard=guard), []

    def pause():
        view.live.paused = True
        begun = time.monotonic()

        def ask():
            waited.append(time.monotonic() - begun)
            guard.request()

        threading.Timer(0.5, ask).start()

    begun = time.monotonic()
    said: list[bool] = []
    heard = Heard(said)
    callbacks = [At(pause), heard, RunRecord("run"), view]
    _, trainer = fit(*small("embedding"), max_steps=2, callbacks=callbacks)
    whole = time.monotonic() - begun
    assert guard.requested and waited and whole > 0.5
    assert trainer.global_step == 2  # here nobody raises: LastCheckpoint does in a run
    assert said == [True, False]  # such as a progress bar
    [training] = read_record("run")  # the pause is no time of the training
    assert training["paused"] > 0.45
    assert training["seconds"] + training["paused"] == pytest.approx(heard.seconds, abs=0.2)


def test_buttons_pause_resume_and_save_what_is_seen(small):
    view, notes = viewer(), {}

    def come():
        (client,) = arrived(view)
        notes["client"] = client
        client.wait("GuiButtonMessage", 4)
        client.set("Snapshot", True)
        client.set("Export", True)
        client.set("Pause", True)
        until(lambda: view.live._jobs.qsize() == 3)
        threading.Thread(target=resume, args=(client,), daemon=True).start()

    def resume(client):
        until(lambda: view.live.paused)
        time.sleep(0.3)
        notes["step"] = view.live.step
        notes["told"] = server.read(Path("run"))["paused"]
        try:
            client.wait("FileTransferStartDownload", 3, seconds=5)
        finally:
            client.set("Pause", True)

    _, trainer = fit(*small("embedding"), max_steps=3, callbacks=[At(come), view])
    assert notes["step"] == 1 and trainer.global_step == 3
    assert notes["told"] is True  # for programs that show the run
    files = sorted(str(path.relative_to("save")) for path in Path("save").rglob("*.*"))
    assert "it1-view1.png" in files and "it1-export/gaussians.ply" in files
    sent = [message["filename"] for message in notes["client"].of("FileTransferStartDownload")]
    assert sent == ["it1-view1.png", "gaussians-points.ply", "gaussians.ply"]
    notes["client"].close()


def test_a_prompt_with_signs_of_markdown_is_shown_as_text():
    """viser's client shows markdown and HTML, pictures of other servers among them."""
    shown = object.__new__(Panel)
    shown.heading, shown.history = SimpleNamespace(), SimpleNamespace()
    prompt = "![a](http://evil.example) <img src=//evil.example> `x` **b** [c](d) &lt;"
    shown.show_prompt(prompt)
    shown.show_changes([Change(1200, PROMPT, "a", prompt)])
    heading, history = shown.heading.content, shown.history.content
    assert heading.startswith("**") and heading.endswith("**")
    for text in (heading[2:-2], history.removeprefix("- step 1,200: prompt ")):
        assert not re.search(r"[^\w ,.“”-]", re.sub(r"\\.", "", text))
        assert prompt in text.replace("\\", "")


def test_of_a_run_that_is_trained_with_a_view_the_address_is_told(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    told = {"url": "http://127.0.0.1:8080"}
    monkeypatch.setattr(server, "running", lambda folder: told if folder == run else None)
    assert cli.main(["view", str(run)]) == 0
    assert capsys.readouterr().out == "view: http://127.0.0.1:8080\n"


def test_a_lone_viewer_does_not_swallow_the_word_after_it():
    argv = ["--viewer", "a red car", "--viewer", "8081", "--viewer"]
    assert options.with_port(argv) == [
        "--viewer=auto",
        "a red car",
        "--viewer",
        "8081",
        "--viewer=auto",
    ]


def test_mistakes_in_the_options_are_one_line():
    def args(**given):
        return SimpleNamespace(
            **{"viewer": None, "viewer_host": None, "viewer_open": False, **given}
        )

    assert options.read(args()) is None
    assert options.read(args(viewer="auto")) == options.ViewerOptions()
    assert options.read(args(viewer="0", viewer_host="0.0.0.0")).is_local is False
    for given in (
        {"viewer": "70000"},
        {"viewer": "-1"},
        {"viewer_host": "x"},
        {"viewer": "1", "viewer_host": " "},
    ):
        with pytest.raises(UserError):
            options.read(args(**given))


def test_without_viser_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install viser=="):
        options.read(SimpleNamespace(viewer="auto", viewer_host=None, viewer_open=False))


@pytest.mark.slow
def test_a_run_without_the_option_imports_no_viser():
    code = (
        "import sys, threestudio.run.callbacks, threestudio.run.cli; print('viser' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize("packed", [True, False])
def test_viser_leaves_room_for_the_object_on_a_phone(packed):
    """The sheet of controls is found by the sizes that this viser gives it."""
    from viser.infra import _infra
    from websockets.datastructures import Headers

    page = (Path(_infra.__file__).parents[1] / "client/build/index.html").read_bytes()
    sheet = Path(_infra.__file__).parents[1] / "client/src/ControlPanel/BottomPanel.tsx"
    assert sheet.read_text().count('width: "20em"') == 2
    assert 'maxHeight: "60%"' in sheet.read_text()
    body = gzip.compress(page) if packed else page
    headers = Headers({"Content-Type": "text/html; charset=utf-8", "Content-Length": "1"})
    headers["Content-Encoding"] = "gzip" if packed else "identity"
    answer = SimpleNamespace(headers=headers, body=body)
    found = phone.leaving_room(lambda connection, request: answer)(None, None)
    told = gzip.decompress(found.body) if packed else found.body
    assert told == page.replace(b"</head>", phone.STYLE.encode() + b"</head>", 1) != page
    assert headers.get_all("Content-Length") == [str(len(found.body))]


def test_a_prompt_is_text_and_neither_markup_nor_code():
    """viser's client makes elements of the HTML in its markdown, frames with scripts too."""
    text = "import {fetch('//x')} <b> [l](http://x) www.x.org `c` *e* é × “q” \x1b"
    shown = as_text(text)
    assert re.sub(r"\\(.)", r"\1", shown) == text[:-1]
    assert not re.search(rf"(?<!\\)[{re.escape(string.punctuation)}]", re.sub(r"\\.", "", shown))
    panel = SimpleNamespace(history=SimpleNamespace(content=""))
    Panel.show_changes(panel, [Change(1, PROMPT, "a", "{x}")])
    assert panel.history.content == r"- step 1: prompt “\{x\}”"


def test_a_visitor_is_asked_one_question_at_a_time():
    opened = []

    class Modal(contextlib.nullcontext):
        closed = False

        def __enter__(self):
            return self

        def close(self):
            self.closed = True

    def add_modal(title):
        opened.append(Modal())
        return opened[-1]

    gui = SimpleNamespace(
        add_modal=add_modal,
        add_markdown=lambda text: None,
        add_button=lambda label, **options: SimpleNamespace(on_click=lambda do: do),
    )
    panel = SimpleNamespace(_questions={}, jobs=None)
    for _ in range(3):
        Panel._confirm_stop(panel, SimpleNamespace(client_id=7, gui=gui))
    assert [modal.closed for modal in opened] == [True, True, False]
