"""The truth that is in the repository, and how it is made."""

import numpy as np
import pytest
from lods.models.renders import Renders

from pocket import truth
from pocket.world import OBJECTS, SIZE, view_of


def test_the_truth_has_every_object_in_every_colour_from_the_judged_cameras():
    known = Renders.read(truth.TRUTH)
    wanted = {(thing.name, colour) for thing in OBJECTS for colour in (None, *thing.colours)}
    assert {(each.name, each.colour) for each in known.objects} == wanted
    assert known.size == SIZE
    for each in known.objects:
        assert np.array_equal(each.cameras, truth.judged_cameras())


def test_the_ideal_denoiser_has_the_gallery():
    known = Renders.read(truth.IDEAL)
    assert {each.name for each in known.objects} == set(truth.GALLERY) and known.size == SIZE
    assert all(len(each.cameras) == truth.IDEAL_VIEWS for each in known.objects)


@pytest.mark.parametrize("folder", [truth.TRUTH, truth.IDEAL])
def test_an_object_fills_its_views_and_stands_in_the_middle(folder):
    known = Renders.read(folder)
    thing = next(each for each in known.objects if each.name == "soccer ball")
    views = known.views(thing)
    assert (views[..., :3] <= views[..., 3:]).all()
    solid = views[..., 3] > 127
    share = solid.mean((1, 2))
    # a ball of the radius 0.87, seen from 3.2 to 4.0 with 36 to 44 degrees
    assert share.min() > 0.23 and share.max() < 0.60
    rows, columns = (np.arange(SIZE) - (SIZE - 1) / 2,) * 2
    middle = [(solid * grid).sum((1, 2)) / solid.sum((1, 2)) for grid in (rows[:, None], columns)]
    assert np.abs(middle).max() < 1.5


def test_the_judged_cameras_are_those_of_the_test_views():
    cameras = truth.judged_cameras()
    assert cameras.shape == (24, 4) and cameras[0] == pytest.approx([15.0, 0.0, 3.6, 40.0])
    assert np.diff(cameras[:, 1]) == pytest.approx(15.0)
    assert [view_of(e, a) for e, a in cameras[[0, 6, 12], :2]] == [1, 0, 2]
