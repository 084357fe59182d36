"""The live view of a run without a browser: it does not disturb the training, and keeps time."""

import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("viser", reason="viser is not installed (the extra 'viewer')")


from tests.host import test_gs_system, test_mesh_system, test_ngp_system
from tests.host.live_views import At, arrived, state, until, viewer
from tests.runs import fit, launch, same
from tests.view_client import Client
from threestudio.run.viewer import server
from threestudio.run.viewer.frames import undisturbed
from threestudio.run.viewer.live import Live
from threestudio.utils.misc import capture_rng_state

small, small_field = test_gs_system.small, test_ngp_system.small  # fixtures
small_mesh = test_mesh_system.small


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


def test_the_announcement_is_there_while_it_trains(small):
    view, found = viewer(), []
    fit(
        *small("embedding"), callbacks=[view, At(lambda: found.append(server.running(Path("run"))))]
    )
    assert found[0]["pid"] == os.getpid()
    assert server.running(Path("run")) is None


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
