"""The tables of a model of the pocket world, on models whose answers are known."""

import csv

import numpy as np
import pytest
import torch
from lods.models.base import Schedule

from pocket import judge, report
from pocket.sharpness import gradients
from pocket.tools import Cameras
from pocket.world import NAMES, VIEWS, asked
from tests.study.world_renders import colour_of, plain_renders

SIZE = 16


class Knows:
    """A model that is sure of one picture: of the object that a text names, from the camera it is
    told, or from the side that the text says; of grey under an empty text. Latents are 2 x - 1."""

    latent_shape, device = (3, SIZE, SIZE), torch.device("cpu")
    schedule = Schedule((1 - torch.linspace(1e-4, 0.02, 100)).cumprod(0))

    def __init__(self, name="", device="cpu", cameras="tokens"):
        self.cameras = cameras

    def text(self, texts):
        rows = torch.full((len(texts), 1, 2), -1.0)
        for row, text in zip(rows, texts):
            if text:
                views = [k for k, v in enumerate(VIEWS) if f"{v} view" in text]
                row[0, 0] = NAMES.index(asked(text)[0].name)
                row[0, 1] = views[0] if views else -1
        return rows

    def encode(self, images):
        return 2 * images - 1

    def decode(self, z):
        return (z / 2 + 0.5).clamp(0, 1)

    def _alpha_sigma(self, t):
        return (a.view(-1, 1, 1, 1) for a in self.schedule.alpha_sigma(t))

    def add_noise(self, z, eps, t):
        alpha, sigma = self._alpha_sigma(t)
        return alpha * z + sigma * eps

    def predict(self, x, t, texts, cameras=None):
        means = []
        azimuths = {"front": 0.0, "back": 180.0, "side": 90.0, "overhead": 90.0}
        for (name, view), azimuth in zip(texts[:, 0].tolist(), cameras.azimuth.tolist()):
            assert (view < 0) == (self.cameras == "tokens" or name < 0)
            seen = azimuths[VIEWS[int(view)]] if self.cameras == "words" else azimuth
            means.append(colour_of(NAMES[int(name)], seen) if name >= 0 else np.full(3, 0.5))
        mean = torch.tensor(np.array(means)).float()[:, :, None, None].expand_as(x)
        alpha, sigma = self._alpha_sigma(t)
        return (x - alpha * self.encode(mean)) / sigma


@pytest.fixture(scope="module")
def renders(tmp_path_factory):
    return plain_renders(tmp_path_factory.mktemp("world") / "renders")


@pytest.fixture(scope="module")
def rows(renders):
    return report.chosen(renders, 6)


def test_each_object_is_shown_as_often_by_held_out_views_in_all_its_colours(renders, rows):
    slugs = [renders.series[i].slug for i, _ in rows]
    assert len(rows) == 240 and all(slugs.count(s) == 6 for s in judge.SLUGS)
    assert all(v % 25 == 24 for _, v in rows)
    car = [renders.series[i].colour for i, _ in rows if renders.series[i].slug == "car"]
    assert sorted(car) == ["", "", "blue", "green", "red", "yellow"]
    assert {v for _, v in rows} == {24, 49}


def test_an_object_that_is_not_rendered_is_named(tmp_path):
    few = plain_renders(tmp_path, ("car", "dog"))
    with pytest.raises(ValueError, match="has too few views of hamburger: render it first"):
        report.chosen(few, 6)


def test_captions_say_what_a_model_is_told(renders):
    i = next(i for i, s in enumerate(renders.series) if (s.slug, s.colour) == ("car", "blue"))
    azimuths = renders.series[i].cameras[:, 1]
    low = renders.series[i].cameras[:, 0] < 60
    front = int(np.flatnonzero(low & (abs(azimuths) < 45))[0])
    side = int(np.flatnonzero(low & (abs(abs(azimuths) - 90) < 30))[0])
    said = "a DSLR image of a blue car"
    for told, view in (("tokens", ""), ("words", ", front view"), ("both", ", front view")):
        assert report.texts_of(renders, [(i, front)], told) == [said + view]
    turned = report.texts_of(renders, [(i, front), (i, side)], "words", turned=True)
    assert turned == [f"{said}, back view", f"{said}, side view"]
    other = report.texts_of(renders, [(i, front)], "tokens", lambda name: "dog")
    assert other == ["a DSLR image of a dog"]


def test_the_opposite_camera_sees_the_other_side(renders, rows):
    plain, turned = (report.cameras_of(renders, rows, turned) for turned in (False, True))
    off = (plain.azimuth - turned.azimuth).abs() % 360
    assert torch.allclose(off, torch.tensor(180.0)) and turned.azimuth.abs().max() <= 180
    assert torch.equal(plain.elevation, turned.elevation) and torch.equal(plain.fovy, turned.fovy)
    assert np.array_equal(torch.stack([*plain.views, plain.fovy], 1), renders.cameras(rows))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5])
def test_a_sample_is_what_the_model_is_sure_of_moved_by_the_guidance(scale):
    cameras = Cameras(*torch.tensor([[0.0] * 3, [10.0, 80, 150], [3.6] * 3]), fovy=torch.ones(3))
    names = ("barrel", "dog", "barrel")
    texts = [f"a {name}" for name in names]
    made = report.generate(Knows(), texts, cameras, scale, steps=7, seed=0, batch=2)
    for picture, name, azimuth in zip(made, names, cameras.azimuth.tolist()):
        wanted = np.clip(0.5 + scale * (colour_of(name, azimuth) - 0.5), 0, 1)
        assert np.allclose(picture, wanted[:, None, None], atol=1e-4)


def test_samples_depend_on_the_seed_of_their_batch_only():
    class Noise(Knows):
        def predict(self, x, t, texts, cameras=None):
            return 0 * x

    cameras = Cameras(*torch.ones(3, 3), fovy=torch.ones(3))
    one, two, other = (
        report.generate(Noise(), ["a dog"] * n, report._part(cameras, slice(n)), 1.0, 3, seed, 2)
        for n, seed in ((3, 0), (2, 0), (3, 1))
    )
    assert torch.equal(one[:2], two) and not torch.equal(one, other)


def test_steepness_is_of_each_picture_twice_the_slope_of_its_brightness():
    """The filter's differences are of pixels two apart; at the border of one apart."""
    x, y = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="xy")
    ramps = torch.stack([0.03 * x + 0.04 * y, 0.01 * x, 0 * x])
    grey, green = ramps[:, None].expand(-1, 3, -1, -1), torch.zeros(3, 3, 20, 20)
    green[:, 1] = ramps
    made, truth = report.steepness(green, grey)
    assert np.allclose(made, 0.587 * truth, atol=1e-6)
    assert truth[1:] == pytest.approx([2 * 0.01 * 19 / 20, 0.0], abs=1e-6)
    inside = gradients(grey.permute(0, 2, 3, 1))[0, 1:-1, 1:-1]
    assert torch.allclose(inside, torch.tensor(2 * 0.05), atol=1e-6)


def test_distances_of_pictures_are_those_of_their_definitions():
    truth = torch.full((2, 3, 16, 16), 0.4)
    made = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert np.allclose(report.decibels(made, truth), [20, 40], atol=1e-3)
    # of constant pictures only the term of luminance is not 1
    c = 0.01**2
    wanted = [(2 * a * 0.4 + c) / (a * a + 0.16 + c) for a in (0.5, 0.41)]
    assert np.allclose(report.ssim(made, truth), wanted, atol=1e-4)


def test_means_are_taken_by_object_and_over_all():
    objects = np.array([NAMES.index(n) for n in ("car", "dog", "car")])
    found = report.by_object(
        objects, a=np.array([1.0, 5, 3]), b=(np.array([1.0, 6, 2]), np.array([2.0, 2, 4]))
    )
    assert {row["object"]: (row["n"], row["a"], row["b"]) for row in found} == {
        "dog": (1, 5.0, 3.0), "car": (2, 2.0, 0.5), "all": (3, 3.0, 1.125),
    }  # fmt: skip
    assert found[-1]["object"] == "all"


@pytest.mark.parametrize("told", ["tokens", "words"])
def test_noise_errors_are_those_of_what_the_model_believes(renders, rows, told):
    some = rows[::4]
    table = report.noise_rows(Knows(cameras=told), renders, some, told, bins=4)
    assert [(row["t_low"], row["t_high"]) for row in table] == [
        (0, 25),
        (25, 50),
        (50, 75),
        (75, 100),
    ]
    labels = judge.labels_of(renders, some)
    believed = {"empty": np.full((len(some), 3), 0.5)}
    if told == "tokens":
        truth = np.stack(
            [colour_of(NAMES[k], a) for k, a in zip(labels["object"], labels["azimuth"])]
        )
        ratio = np.square(2 * (truth - believed["empty"])).mean()
        for row in table:
            # the truth is in whole numbers of 255 parts, which counts where sigma is small
            assert row["right"] < 1e-3 * row["empty"] < row["turned"]
            t = np.arange(row["t_low"], row["t_high"])
            alpha, sigma = (a.numpy() for a in Knows.schedule.alpha_sigma(torch.from_numpy(t)))
            assert (alpha / sigma).min() ** 2 * ratio * 0.5 < row["empty"]
            assert row["empty"] < (alpha / sigma).max() ** 2 * ratio * 2
    for row in table:
        assert row["n"] == len(some)
        assert row["turned_minus_right"] > 0 and row["wrong_minus_empty_se"] > 0
        assert row["empty_minus_right"] == pytest.approx(row["empty"] - row["right"], abs=2e-6)


def test_a_training_view_has_no_distance_to_the_nearest_one(renders):
    car = next(i for i, s in enumerate(renders.series) if s.slug == "car" and not s.colour)
    images = judge.pictures(renders.rgba([(car, 3), (car, 24)]))
    objects = np.full(2, NAMES.index("car"))
    found = report.nearest(renders, images, objects)
    assert found[0] < 1e-3
    sides = np.delete(renders.series[car].cameras[:, 1], [24, 49])
    mine = colour_of("car", renders.series[car].cameras[24, 1])
    gap = np.abs(colour_of("car", sides) - mine).max(-1).min() / 3**0.5
    assert found[1] == pytest.approx(gap, abs=3e-3)


def test_all_tables_are_written(tmp_path, renders, monkeypatch):
    monkeypatch.setattr(report, "load", lambda *_: judge.Judge().eval())
    report.report(
        tmp_path / "model", renders.folder.parent, tmp_path / "out", ["tokens", "words"],
        scale=1.0, steps=3, rounds=1, count=8, model_of=Knows,
    )  # fmt: skip
    tables = {}
    for name in ("vae", "accuracy", "samples", "noise", "nearest"):
        with open(tmp_path / "out" / f"{name}.csv") as file:
            tables[name] = list(csv.DictReader(file))
    assert tables["vae"][-1]["object"] == "all" and float(tables["vae"][-1]["psnr"]) > 90
    assert [row["source"] for row in tables["accuracy"]] == [
        "true views", "reconstructions", "samples, tokens", "samples, words",
    ]  # fmt: skip
    over_all = {r["told"]: float(r["psnr"]) for r in tables["samples"] if r["object"] == "all"}
    assert over_all["tokens"] > 45 > 35 > over_all["words"]
    assert {row["told"] for row in tables["noise"]} == {"tokens", "words"}
    assert len(tables["nearest"]) == 3
    assert (tmp_path / "out" / "samples.webp").read_bytes()[8:12] == b"WEBP"


@pytest.mark.parametrize("arguments", [["--work", "nowhere"], ["--steps", "0"]])
def test_what_cannot_be_reported_costs_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "load", lambda *_: judge.Judge().eval())
    with pytest.raises(SystemExit) as ended:
        report.main(arguments)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) > 20
