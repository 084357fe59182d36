"""The live view of a run without a browser: it does not disturb the training, and keeps time."""

import contextlib
import gzip
import math
import os
import random
import re
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("viser", reason="viser is not installed (the extra 'viewer')")

from lods import cli
from pytorch_lightning.callbacks import Callback

from tests.host import test_gs_system, test_mesh_system, test_ngp_system
from tests.host.test_cli import make_run
from tests.runs import fit, launch, same
from tests.view_client import Client
from threestudio.data.cameras import camera_batch
from threestudio.run.interrupt import InterruptGuard
from threestudio.run.interventions import PROMPT, Change, Interventions
from threestudio.run.record import RunRecord, read_record
from threestudio.run.viewer import options, phone, server
from threestudio.run.viewer.budget import FRAME, FRESH_EVERY, SHARP, Budget, Cost
from threestudio.run.viewer.callback import ViewerCallback
from threestudio.run.viewer.curves import MOST, Curves
from threestudio.run.viewer.frames import View, batch_of, quaternion, rotation, undisturbed
from threestudio.run.viewer.live import Live
from threestudio.run.viewer.panel import Panel, as_text
from threestudio.run.viewer.visitors import Drawn, Visitor
from threestudio.utils.errors import UserError
from threestudio.utils.misc import capture_rng_state

small, small_field = test_gs_system.small, test_ngp_system.small  # fixtures
small_mesh = test_mesh_system.small


def viewer(folder="run", guard=None, interventions=None, host=options.LOCAL):
    chosen = options.ViewerOptions(0, host)
    Path(folder).mkdir(exist_ok=True)
    guard = guard or InterruptGuard()
    changes = interventions or Interventions(folder)
    return ViewerCallback(chosen, server.listen(chosen), folder, guard, changes)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def arrived(view, count=1):
    """So many visitors, who look from where a camera begins, once they are there."""
    clients = [Client(view.server.port) for _ in range(count)]
    for client in clients:
        client.look()
    until(lambda: len(view.live.visitors) == count)
    return clients


class At(Callback):
    """Calls functions at the ends of steps."""

    def __init__(self, *done):
        self.done = done

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step <= len(self.done) and self.done[trainer.global_step - 1]:
            self.done[trainer.global_step - 1]()


class Heard(Callback):
    """Keeps what it is told of pauses."""

    def __init__(self, said):
        self.said, self.seconds = said, 0.0

    def on_train_start(self, trainer, pl_module):
        self.seconds = -time.monotonic()

    def on_train_end(self, trainer, pl_module):
        self.seconds += time.monotonic()

    def note_pause(self, paused):
        self.said.append(paused)


def state(system, trainer):
    found = {"system": system.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
    return found | {"random": capture_rng_state()}


# --- the training does not notice ---


@pytest.mark.parametrize(
    ("representation", "method"),
    [
        ("gaussians", "embedding"),
        pytest.param("gaussians", "lora", marks=pytest.mark.slow),
        pytest.param("radiance field", "embedding", marks=pytest.mark.slow),
        pytest.param("radiance field", "lora", marks=pytest.mark.slow),
        pytest.param("mesh", "embedding", marks=pytest.mark.slow),
    ],
)
def test_a_visitor_who_looks_on_changes_no_bit_of_the_training(
    small, small_field, small_mesh, representation, method
):
    """Pictures are drawn, cameras and what the model sees are shown, and all is as without."""
    kinds = {"gaussians": (small, 3), "radiance field": (small_field, 2), "mesh": (small_mesh, 2)}
    make, boxes = kinds[representation]
    run = make(method, "system.background.random_aug=true")
    alone = state(*fit(*run, max_steps=14))
    view, clients = viewer(), []

    def come():
        (client,) = arrived(view)
        clients.append(client)
        client.wait("GuiCheckboxMessage", boxes)
        client.set("Training cameras", True)
        client.set("Show what the model sees", True)
        client.set("Share of the time (%)", 90)
        until(lambda: view.live.panel.see.value and view.live.panel.cameras.value)

    watched = state(*fit(*run, max_steps=14, callbacks=[At(come), view]))
    same(alone, watched)
    (client,) = clients
    for shown in ("BackgroundImageMessage", "CameraFrustumMessage", "GuiImageMessage"):
        assert client.of(shown), shown
    client.close()


def test_modes_and_random_numbers_are_put_back_even_if_a_picture_fails():
    class Part(torch.nn.Linear):
        hooks = []

        def train(self, mode=True):  # of upstream's renderers
            self.hooks.append(mode)
            return super().train(mode)

    system = torch.nn.Module()
    system.geometry, system.renderer = torch.nn.Sequential(Part(1, 1), Part(1, 1)), Part(1, 1)
    system.train()
    system.geometry[1].training = False  # a part that is kept in evaluation
    system.renderer.hooks.clear()
    before = capture_rng_state()
    with pytest.raises(RuntimeError), undisturbed(system, SimpleNamespace()):
        assert not any(m.training for m in system.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        raise RuntimeError
    assert system.training and system.renderer.training and system.geometry[0].training
    assert not system.geometry[1].training and system.renderer.hooks[-1] is True
    same(before, capture_rng_state())
    assert torch.is_grad_enabled()


def test_without_a_visitor_nothing_is_drawn_or_sent(small, monkeypatch):
    view, sent = viewer(), []
    monkeypatch.setattr("threestudio.run.viewer.live.undisturbed", lambda *a: sent.append(1))
    count = []

    def look():
        buffer = view.server.viser._websock_server._broadcast_buffer
        count.append(buffer.message_counter)
        view.live._told.clear()  # all of it is due

    fit(*small("embedding"), max_steps=3, callbacks=[view, At(look, None, look)])
    assert not sent and count[0] == count[1]


# --- pictures ---


def test_a_camera_of_viser_is_the_same_camera_of_threestudio():
    angles = {"elevation": 20.0, "azimuth": 110.0, "camera_distances": 2.5, "fovy": 0.7}
    told = {name: torch.tensor([value]) for name, value in angles.items()}
    wanted = camera_batch(**told, height=6, width=8)
    c2w = wanted["c2w"][0].double().numpy()
    wxyz = quaternion(c2w[:3, :3] * np.array([1.0, -1.0, -1.0]))
    view = View(wxyz, tuple(c2w[:3, 3]), 0.7, 8, 6)
    found = batch_of(view, 8, 6, "cpu")
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and name != "index":
            assert torch.allclose(value.float(), wanted[name].float(), atol=2e-5), name


def test_quaternions_and_rotations_are_each_others_inverse():
    draw = np.random.default_rng(0)
    for half_turn in (np.eye(4)[1], np.eye(4)[2], np.eye(4)[3], *draw.normal(size=(50, 4))):
        matrix = rotation(tuple(3 * half_turn))
        assert np.allclose(matrix @ matrix.T, np.eye(3)) and np.linalg.det(matrix) > 0
        assert np.allclose(rotation(quaternion(matrix)), matrix)


def test_a_visitor_wants_at_most_one_picture_the_one_of_now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    visitor = Visitor(SimpleNamespace())
    views = [View((1.0, 0.0, 0.0, 0.0), (float(i), 0.0, 0.0), 1.0, 64, 48) for i in range(1000)]
    for view in views:
        visitor.look(view)
    assert visitor.view is views[-1] and visitor.wants(0, now[0]) == "sharp"
    visitor.drawn = Drawn(views[-1], 0, 48, True)
    assert visitor.wants(0, 101.0) == "" and visitor.wants(1, 101.0) == "fresh"
    now[0] = 101.0
    visitor.look(views[0])
    assert visitor.wants(1, 101.1) == "moving" and visitor.wants(1, 101.9) == "sharp"
    visitor.drawn = Drawn(views[0], 1, 20, False, rough=True)
    assert visitor.wants(1, 101.1) == "" and visitor.wants(1, 101.9) == "sharp"
    assert visitor.wants(2, 101.9) == "sharp"
    visitor.drawn = Drawn(views[0], 1, 20, False)  # a small one of an object that grows
    assert visitor.wants(2, 101.9) == "fresh" and visitor.wants(1, 101.9) == "sharp"  # paused


def test_pictures_have_the_shape_of_the_canvas_and_at_most_the_pixels_asked_for():
    view = View((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 1.0, 1600, 900)
    assert view.size(math.inf, 2000) == (1600, 900)
    assert view.size(math.inf, 450) == (800, 450)
    width, height = view.size(40_000, 2000)
    assert width * height < 42_000 and abs(width / height - 16 / 9) < 0.05
    assert min(view.size(1, 2000)) == 48  # what can still be seen


# --- time ---


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_over_a_training_the_view_takes_its_share_and_no_more(share):
    """Steps of 0.05 s, pictures of 0.2 s that are drawn whenever they are allowed."""
    budget, now, spent = Budget(share), 0.0, 0.0
    while now < 2000:
        now += 0.05
        if budget.allows(False, now):
            now, spent = now + 0.2, spent + 0.2
            budget.spend(0.2, now)
    assert 0.75 * share < spent / now <= share


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_an_object_that_grows_is_drawn_every_few_seconds(share):
    """However slow the machine: pictures take what they may take. They do not wait until all is
    paid back that was spent on a camera that has moved before."""
    budget, now = Budget(share), 100.0
    for _ in range(50):
        budget.spend(SHARP, now, asked=True, owed=True)
        now += SHARP
    due = now
    for _ in range(5):
        while not budget.allows(False, now):
            now += 0.01
        assert now - due < max(FRESH_EVERY, 2 * FRAME / share) + SHARP
        due = now
        now += budget.seconds("fresh")
        budget.spend(budget.seconds("fresh"), now)


@pytest.mark.parametrize("sharp", [0.1, 0.7, SHARP])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.4])
def test_the_first_whole_picture_is_part_of_the_share_of_a_visitor_at_rest(share, sharp):
    """Each time that something is due: all seconds so far, of those since the camera has rested."""
    budget, now, spent, parts = Budget(share), sharp, sharp, []
    budget.spend(sharp, now, asked=True, owed=True)
    while now < 20 * SHARP / share:
        now += 0.01
        if budget.allows(False, now):
            parts.append((now, spent / now))
            seconds = budget.seconds("fresh")
            now, spent = now + seconds, spent + seconds
            budget.spend(seconds, now)
    late = [part for at, part in parts if at > 3 * sharp / share]
    assert 0.7 * share < min(late) and max(late) <= share


def test_a_visitor_who_never_rests_takes_half_of_the_time_at_most():
    budget, now, spent = Budget(), 0.0, 0.0
    while now < 500:
        now += 0.05
        for seconds in (0.12, 2.0):  # of a camera that moves, and has come to rest
            if budget.allows(True, now):
                now, spent = now + seconds, spent + seconds
                budget.spend(seconds, now, asked=True)
            budget.spend(0.001, now)  # the line of text
    assert 0.4 < spent / now <= 0.5


def test_pictures_do_not_keep_curves_from_being_drawn():
    live, done = object.__new__(Live), []
    live.paused, live.interventions, live.budget = True, Interventions(), Budget()
    live._draw_fresh = lambda: bool(done.append("picture")) or True
    live._turns = [live._draw_fresh, lambda: bool(done.append("curves")) or True, lambda: False]
    for _ in range(4):
        live._take_a_turn()
    assert done == ["picture", "curves"] * 2


def test_the_size_of_pictures_is_learned_from_what_they_take():
    cost = Cost()
    for _ in range(20):
        for large, seconds in ((False, 0.12), (True, 1.0)):
            pixels = cost.pixels(seconds)
            cost.saw(pixels, 0.05 + 1e-6 * pixels, large)
    for seconds in (0.12, 1.0):
        assert abs(0.05 + 1e-6 * cost.pixels(seconds) - seconds) < 0.02


def test_curves_keep_a_bounded_number_of_points_over_all_steps():
    curves = Curves()
    for step in range(1, 20_000):
        curves.add(step, {"loss": float(step)})
    steps, losses, none = curves.series("loss", "other")
    assert MOST / 2 <= len(steps) <= MOST and np.array_equal(steps, losses)
    assert steps[0] < 100 and steps[-1] > 19_000 and np.isnan(none).all()
    assert np.diff(steps).max() <= 2 * 20_000 / MOST * 2


# --- what happens around it ---


def test_visitors_who_come_and_vanish_do_not_end_the_run(small):
    view, clients = viewer(), []

    def two_come():
        clients.extend(arrived(view, 2))

    def one_vanishes():
        for client in clients:
            client.wait("BackgroundImageMessage")
        clients[0].socket.socket.close()  # without a word

    seen = []
    last = lambda: seen.append(len(view.live.visitors))  # noqa: E731
    _, trainer = fit(
        *small("embedding"),
        max_steps=6,
        callbacks=[At(two_come, None, one_vanishes), view, At(*[None] * 5, last)],
    )
    assert trainer.global_step == 6 and seen[0] in (1, 2)
    clients[1].close()
    assert not Path("run", server.FILE).exists()


def test_visitors_see_the_object_of_the_last_step_and_that_no_more_comes(small):
    view, clients, shown = viewer(), [], []

    def come():
        clients.extend(arrived(view))

    def look():
        clients[0].wait("BackgroundImageMessage")
        until(view.live.visitors.all()[0].is_ready)
        shown.append(len(clients[0].of("BackgroundImageMessage")))
        view.live.budget.spend(60, time.monotonic())  # nothing more is due

    fit(*small("embedding"), max_steps=4, callbacks=[At(come, None, look), view])
    clients[0].close()
    assert len(clients[0].of("BackgroundImageMessage")) > shown[0]
    told = [message["updates"] for message in clients[0].of("GuiUpdateMessage")]
    assert any("Ended at step 4 of 4" in str(update) for update in told)


def test_a_renderer_that_fails_costs_pictures_and_not_the_run(small, monkeypatch):
    view, clients = viewer(), []

    def come():
        clients.extend(arrived(view))

    def broken(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("threestudio.run.viewer.frames.Painter.__call__", broken)
    _, trainer = fit(*small("embedding"), max_steps=6, callbacks=[At(come), view])
    assert trainer.global_step == 6
    clients[0].close()


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


def test_the_first_picture_which_may_be_small_is_followed_by_a_whole_one(small):
    """What a picture costs is not known before the first."""
    view, seen = viewer(), []

    def come():
        client = Client(view.server.port)
        client.look(image_width=320, image_height=240)
        until(lambda: len(view.live.visitors) == 1)
        seen.append(client)

    def look():
        [visitor] = view.live.visitors.all()
        seen.append(visitor.drawn)
        time.sleep(0.1)

    fit(*small("embedding"), max_steps=8, callbacks=[view, At(come, *[look] * 7)])
    seen.pop(0).close()
    heights = [drawn.height for drawn in seen if drawn is not None]
    assert heights[0] < 240 and heights[-1] == 240 and seen[-1].full


def test_where_steps_are_slow_the_line_of_text_keeps_no_picture_back(small, monkeypatch):
    """It is told anew after each step that takes longer than the time between two lines."""
    monkeypatch.setattr("threestudio.run.viewer.live.STATUS_EVERY", 0.0)
    monkeypatch.setattr(Budget, "seconds", lambda budget, kind: 0.001)
    view, seen = viewer(), []

    def come():
        seen.extend(arrived(view))

    def look():
        seen.append([visitor.frames for visitor in view.live.visitors.all()])
        time.sleep(0.1)

    fit(*small("embedding"), max_steps=12, callbacks=[view, At(come, *[look] * 11)])
    seen.pop(0).close()
    assert seen[-1][0] >= 4


def test_what_the_model_sees_comes_at_once_when_it_is_asked_for(small):
    """A budget that allows nothing of what is shown unasked does not keep it back."""
    view, clients = viewer(), []

    def come():
        clients.extend(arrived(view))
        clients[0].wait("GuiCheckboxMessage", 3)
        clients[0].set("Show what the model sees", True)
        until(lambda: view.live.panel.see.value)

    def forbid():
        view.live.budget._rest_due, view.live.budget._asked_due = math.inf, 0.0

    fit(*small("embedding"), max_steps=4, callbacks=[At(come, forbid, forbid, forbid), view])
    assert clients[0].of("GuiImageMessage")
    clients[0].close()


def test_the_announcement_is_there_while_it_trains(small):
    view, found = viewer(), []
    fit(
        *small("embedding"), callbacks=[view, At(lambda: found.append(server.running(Path("run"))))]
    )
    assert found[0]["pid"] == os.getpid()
    assert server.running(Path("run")) is None


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


def test_a_finished_run_is_shown_until_it_is_asked_to_stop(small, monkeypatch, capfd):
    assert launch(*small("embedding")) == 0
    trial, idle, clients = test_gs_system.trial("embedding"), Live.idle, []
    files = sorted(path for path in trial.rglob("*") if path.is_file())

    def looked_at(live):
        clients.extend([] if clients else [Client(live.server.port)])
        clients[0].look()
        idle(live)
        if clients[0].of("BackgroundImageMessage"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Live, "idle", looked_at)
    resume = f"resume={trial / 'ckpts' / 'last.ckpt'}"
    parsed = str(trial / "configs" / "parsed.yaml")
    assert launch([parsed], [resume], "--view", "--viewer", "0") == 0
    assert "view: http://127.0.0.1:" in capfd.readouterr().out
    assert files == sorted(path for path in trial.rglob("*") if path.is_file())
    clients[0].close()


def test_of_a_run_that_is_trained_with_a_view_the_address_is_told(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    told = {"url": "http://127.0.0.1:8080"}
    monkeypatch.setattr(server, "running", lambda folder: told if folder == run else None)
    assert cli.main(["view", str(run)]) == 0
    assert capsys.readouterr().out == "view: http://127.0.0.1:8080\n"


# --- the command line ---


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


# --- what visitors may write ---


def test_what_fails_in_the_view_costs_the_view_and_not_the_run(small, monkeypatch):
    def broken(self):
        raise ZeroDivisionError

    monkeypatch.setattr(Live, "_serve", broken)
    view, closed = viewer(), []
    _, trainer = fit(
        *small("embedding"),
        max_steps=6,
        callbacks=[view, At(*[None] * 4, lambda: closed.append(view.server is None))],
    )
    assert trainer.global_step == 6 and closed == [True]


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


@pytest.mark.parametrize(("width", "height", "away"), [(80, 40, 1), (40, 80, 2), (8, 800, 4)])
def test_in_a_high_window_the_first_view_is_from_further_away(small, width, height, away):
    """A browser begins somewhere, and goes to the first view when it has been told of it."""
    view, seen = viewer(), []

    def come():
        client = Client(view.server.port)
        first = [*map(float, view.server.viser.initial_camera.position)]
        for position in ([3.0, 3.0, 3.0], first):
            client.look(image_width=width, image_height=height, position=position)
        until(lambda: len(view.live.visitors) == 1)
        [visitor] = view.live.visitors.all()
        until(lambda: visitor.view.position[1] == 0)
        seen.extend([np.linalg.norm(visitor.view.position) / np.linalg.norm(first), client])

    fit(*small("embedding"), max_steps=1, callbacks=[view, At(come)])
    seen[1].close()
    assert seen[0] == pytest.approx(away, rel=1e-3)


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
