"""Numbers in a model folder that tables are made of: bounded, in one line."""

import json
import shutil
from pathlib import Path

import pytest
from lods.models.unet import UNetModel

from tests.runs import ROOT
from threestudio.utils.errors import UserError
from threestudio.utils.safe_models import MAX_TIMESTEPS, refuse_long_schedule

SHAPES = ROOT / "custom" / "threestudio-lods" / "lods" / "models" / "pocket-shapes"


@pytest.fixture
def folder(tmp_path):
    """``folder(file, **values)``: a copy of pocket-shapes with other values in one file."""

    def write(file, **values):
        shutil.copytree(SHAPES, tmp_path / "model", dirs_exist_ok=True)
        path = tmp_path / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return str(tmp_path / "model")

    return write


@pytest.mark.parametrize("steps", [10**12, MAX_TIMESTEPS + 1, 0, -1, "many", None, 1.5, True])
def test_a_schedule_of_no_sensible_length_is_refused_before_it_is_made(lods, folder, steps):
    model = folder("scheduler/scheduler_config.json", num_train_timesteps=steps)
    line = "num_train_timesteps=.*, not 1 to 100000: the model folder is damaged"
    with pytest.raises(ValueError, match=line) as caught:
        UNetModel.from_pretrained(model)
    assert len(str(caught.value)) < 300
    with pytest.raises(UserError, match=r"scheduler_config\.json: num_train_timesteps is"):
        refuse_long_schedule(model, "scheduler")


def test_a_schedule_that_diffusers_cannot_make_is_one_line(lods, folder):
    model = folder("scheduler/scheduler_config.json", beta_schedule="wavy")
    with pytest.raises(ValueError, match=r"cannot be made .*: the model folder is damaged"):
        UNetModel.from_pretrained(model)


@pytest.mark.parametrize("size", [10**6, 0])
def test_a_latent_of_no_sensible_size_is_refused(lods, folder, size):
    model = folder("unet/config.json", sample_size=size)
    with pytest.raises(ValueError, match=r"sample_size is .*, not 1 to 1024"):
        UNetModel.from_pretrained(model)


def test_good_ones_pass(lods):
    refuse_long_schedule(str(SHAPES), "scheduler")
    refuse_long_schedule(str(SHAPES), "unet")
    refuse_long_schedule(str(Path("nowhere")), "scheduler")
    assert UNetModel.from_pretrained(str(SHAPES)).schedule.steps == 1000
