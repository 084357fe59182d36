"""What the live view draws, when, and how much of the time that takes."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("viser", reason="viser is not installed (the extra 'viewer')")


from tests.host import test_gs_system
from tests.host.live_views import At, arrived, until, viewer
from tests.runs import fit
from tests.view_client import Client
from threestudio.data.cameras import camera_batch
from threestudio.run.interventions import Interventions
from threestudio.run.viewer.budget import FRAME, FRESH_EVERY, SHARP, Budget, Cost
from threestudio.run.viewer.curves import MOST, Curves
from threestudio.run.viewer.frames import View, batch_of, quaternion, rotation
from threestudio.run.viewer.live import Live
from threestudio.run.viewer.visitors import Drawn, Visitor

small = test_gs_system.small  # a fixture


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
