"""The pictures that a training draws before its first validation, and that it sees nothing of them.

A run of three steps whose validation comes after the second one.
"""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import threestudio
from tests.runs import ROOT, SMALL_FIELD, launch, read, same, small_run
from threestudio.run.first_picture import is_wanted
from threestudio.utils.errors import UserError

KEYS = ("state_dict", "optimizer_states", "rng_state", "global_step")
CASES = {
    "lods-gs-system": (
        ["lods-gs-embedding.yaml", "pocket-shapes.yaml"],
        [
            "system.geometry.ball={n_points: 120, radius: 0.6}",
            "system.renderer.backend=torch",
            "system.strategy={name: mcmc, mcmc: {refine_start_iter: 0, refine_every: 1, "
            "refine_stop_iter: 9, min_opacity: 0.09}}",
        ],
    ),
    "lods-ngp-system": (
        ["lods-ngp-embedding.yaml", "pocket-shapes-ngp.yaml"],
        SMALL_FIELD,
    ),
}


@pytest.fixture
def trained(tiny_sd, tmp_path, monkeypatch):
    """``trained(system, early_previews, *overrides)`` returns the last checkpoint, the steps of the
    pictures, and their folder."""
    monkeypatch.chdir(tmp_path)
    model = tiny_sd()

    def train(system, previews, *more):
        configs, overrides = CASES[system]
        folder = Path("outputs", configs[0].removesuffix(".yaml"), previews.strip("[]") or "none")
        words = [*small_run(model), *overrides, "trainer.max_steps=3", "data.n_test_views=1"]
        words += [f"system.early_previews={previews}", f"tag={folder.name}", *more]
        assert launch([str(ROOT / "configs" / name) for name in configs], words) == 0
        files = (folder / "save").glob("it*-0.png")
        steps = sorted(int(re.match(r"it(\d+)-0", file.name)[1]) for file in files)
        return read(folder / "ckpts" / "last.ckpt"), steps, folder / "save"

    return train


@pytest.mark.parametrize(
    "system", ["lods-gs-system", pytest.param("lods-ngp-system", marks=pytest.mark.slow)]
)
def test_previews_leave_the_training_alone_whatever_they_draw_at_random(
    system, trained, monkeypatch
):
    """... and change no module's mode: the picture of the renderer that follows is jittered again,
    the background is random again."""
    before, steps, _ = trained(system, "[]")
    assert steps == [2]
    cls = threestudio.find(system)
    draw, drawn = cls.validation_step, []

    def wasteful(self, batch, batch_idx):
        drawn.append((self.true_global_step, self.renderer.training, self.training))
        torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
        return draw(self, batch, batch_idx)

    monkeypatch.setattr(cls, "validation_step", wasteful)
    after, steps, folder = trained(system, "[0,1,2,7]")
    assert steps == [0, 1, 2]
    # the one of step 2 is the validation's, which is not drawn twice
    assert [step for step, _, _ in drawn] == [0, 1, 2]
    assert not any(rendering for _, rendering, _ in drawn)
    for key in KEYS:
        same(before[key], after[key], key)
    pictures = [np.asarray(Image.open(folder / f"it{step}-0.png")) for step in steps]
    assert (pictures[0] != pictures[1]).any()


def test_the_first_preview_is_there_before_the_first_step(trained, monkeypatch):
    cls = threestudio.find("lods-gs-system")
    step, seen = cls.training_step, []

    def looking(self, batch, batch_idx):
        seen.append(sorted(path.name for path in Path("outputs").glob("*/*/save/*.png")))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(cls, "training_step", looking)
    trained("lods-gs-system", "[0]")
    assert seen[0] == ["it0-0.png"]


@pytest.mark.slow
def test_a_run_that_is_resumed_draws_no_preview_again(trained):
    _, steps, folder = trained("lods-gs-system", "[0,1]")
    assert steps == [0, 1, 2]
    for path in folder.glob("it[01]-0.png"):
        path.unlink()
    last = folder.parent / "ckpts" / "last.ckpt"
    _, steps, _ = trained("lods-gs-system", "[0,1]", f"resume={last}", "trainer.max_steps=4")
    assert steps == [2, 4]  # those of the validations


@pytest.mark.slow
def test_a_training_without_validations_draws_none(trained):
    _, steps, _ = trained("lods-gs-system", "[0,1]", "trainer.limit_val_batches=0")
    assert steps == []


# --- the first picture, drawn before the model is loaded ---


@pytest.fixture
def seen_by_the_guidance(monkeypatch):
    """The files of pictures that are there when the guidance begins to load its model."""
    cls = threestudio.find("lods-embedding-guidance")
    configure, seen = cls.configure, []

    def looking(self, *args, **kwargs):
        seen.extend(Path("outputs").glob("*/*/save/*.png"))
        return configure(self, *args, **kwargs)

    monkeypatch.setattr(cls, "configure", looking)
    return seen


@pytest.mark.parametrize(
    "system", ["lods-gs-system", pytest.param("lods-ngp-system", marks=pytest.mark.slow)]
)
def test_the_first_picture_is_that_of_step_0_and_there_before_the_model(
    system, trained, seen_by_the_guidance, monkeypatch
):
    _, _, folder = trained(system, "[0]")
    assert seen_by_the_guidance == [folder / "it0-0.png"]
    early = np.asarray(Image.open(folder / "it0-0.png"))
    assert early[:, :24].std() > 0  # something is drawn
    monkeypatch.setattr("threestudio.run.first_picture.is_wanted", lambda *_: False)
    _, _, folder = trained(system, "[0,1]")
    assert not [path for path in seen_by_the_guidance if path.parent == folder]
    late = np.asarray(Image.open(folder / "it0-0.png"))
    # the points at which a grid looks first, in cells of a radiance field, are others
    assert np.abs(early.astype(int) - late).mean() <= (0 if system == "lods-gs-system" else 2)


def test_an_object_that_changes_after_its_first_picture_is_drawn_again_at_step_0(
    trained, monkeypatch
):
    cls = threestudio.find("lods-gs-system")
    configure, draw, drawn = cls.configure, cls.validation_step, []

    def changed(self):
        configure(self)
        with torch.no_grad():
            self.geometry.sh0.neg_()

    def noting(self, batch, batch_idx):
        drawn.append(self.geometry.sh0.sum().item())
        return draw(self, batch, batch_idx)

    monkeypatch.setattr(cls, "configure", changed)
    monkeypatch.setattr(cls, "validation_step", noting)
    trained("lods-gs-system", "[0]", "trainer.max_steps=1")
    assert len(drawn) == 2 and drawn[0] == -drawn[1] != 0


def test_a_run_whose_model_cannot_be_loaded_leaves_no_first_picture(trained, monkeypatch):
    seen = []

    def failing(self):
        seen.extend(Path("outputs").glob("*/*/save/*.png"))
        raise UserError("there is no model")

    monkeypatch.setattr(threestudio.find("lods-embedding-guidance"), "configure", failing)
    with pytest.raises(AssertionError):  # the status is 2
        trained("lods-gs-system", "[0]")
    assert [path.name for path in seen] == ["it0-0.png"]
    assert not list(Path("outputs").rglob("*"))


def test_a_first_picture_that_fails_costs_no_run(trained, monkeypatch):
    monkeypatch.setattr("threestudio.run.first_picture._loader", lambda cfg: 1 / 0)
    _, steps, _ = trained("lods-gs-system", "[0]")
    assert 0 in steps


def test_no_file_of_an_earlier_run_is_replaced_early(tmp_path):
    cfg = OmegaConf.create({"resume": None, "trainer": {}})
    assert is_wanted(cfg, str(tmp_path / "save"))
    (tmp_path / "it0-0.png").touch()
    assert not is_wanted(cfg, str(tmp_path))
