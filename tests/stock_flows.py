"""What the tests of a family of flows compare with: its pipeline in diffusers, and its folder with
a field changed."""

import json
import shutil
from pathlib import Path

import lods
import torch

from tests.families import FAMILIES


def load(folder, **settings):
    return lods.models.load(str(folder), "cpu", **settings)


def pipeline_of(family: str, folder, unshifted: bool = True):
    """The pipeline of diffusers; ``unshifted``: with a scheduler that takes a sigma as it is."""
    import diffusers

    more = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()} if unshifted else {}
    pipeline = getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(folder, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noisy(model, rows=2, seed=0):
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def token_counts(model, texts):
    """What the plan of its texts says of their lengths, which is above the rows of an embedding
    where a text is cut off."""
    from lods.models.cards import Location
    from lods.models.files import load_complete

    def loader(cls, part, **options):
        if issubclass(cls, torch.nn.Module):
            return load_complete(cls, model.name, part, **options)
        return cls.from_pretrained(model.name, subfolder=part, **options)

    return model.text_plan(Location(model.name)).encode(texts, loader, "cpu")[1]


def edited(folder, tmp_path: Path, file: str, **fields) -> Path:
    """A copy of the folder, with fields of one of its JSON files set."""
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


def latents_and_plain(model):
    """(latents of two random pictures, what the VAE itself makes of them with the same random
    numbers), both decoded alike."""
    size = model.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.manual_seed(0)
        got = model.encode(images)
        torch.manual_seed(0)
        plain = model.vae.encode(images * 2 - 1).latent_dist.sample()
        want = (model.vae.decode(plain).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(model.decode(got), want, rtol=1e-4, atol=1e-4)
    assert got.shape == (2, *model.latent_shape)
    return got, plain
