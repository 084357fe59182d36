"""``pocket-views``: its quadruples of views, its start, a short training, and its folder."""

import shutil

import numpy as np
import pytest
import torch

from pocket import autoencoder, diffusion, latents, make, multiview, training, world
from pocket.latents import Latents
from pocket.tokenizer import save_tokenizer
from pocket.tools import load_model

SHAPE = {"channels": (16, 32), "width": 32, "size": 4}
SERIES = (("hamburger", ""), ("armchair", ""), ("armchair", "red"))
COUNT = 50


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokens"), latents.WORDS, latents.LENGTH)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Cameras of the world, and latents of 4 x 4 that say which view they are of."""
    folder = tmp_path_factory.mktemp("work")
    for k, (slug, colour) in enumerate(SERIES):
        there = folder / "renders" / slug
        there.mkdir(parents=True, exist_ok=True)
        np.save(there / "cameras.npy", world.cameras(COUNT))
        (folder / "latents").mkdir(exist_ok=True)
        z = np.zeros((COUNT, 2, autoencoder.LATENT_CHANNELS, 4, 4), np.float16)
        z[:, :, 0], z[:, :, 1] = k, np.arange(COUNT)[:, None, None, None] / 100
        z[:, 1, 2] = 1
        np.save(folder / "latents" / f"{slug}{'-' * bool(colour)}{colour}.npy", z)
    return folder


def small(tokens, seed=0):
    torch.manual_seed(seed)
    return multiview.Model(tokens, **SHAPE)


def test_four_of_the_worlds_cameras_are_about_a_quarter_of_a_turn_apart():
    cameras = world.cameras(400)
    views = np.array([v for v in range(400) if v % 25 != 24])
    found = multiview.quadruples(cameras, views)
    assert (found[:, 0] == views).all() and set(found.flat) <= set(views)
    low = found[cameras[views, 0] < 45]
    turns = cameras[low, 1] - cameras[low[:, :1], 1]
    off = (turns - np.array([0, 90, 180, 270]) + 180) % 360 - 180
    assert np.abs(off).mean() < 6 and np.quantile(np.abs(off), 0.99) < 25
    assert np.abs(cameras[low, 0] - cameras[low[:, :1], 0]).mean() < 6
    size = np.log(cameras[..., 2] * np.tan(np.radians(cameras[..., 3]) / 2))
    assert np.abs(size[low] - size[low[:, :1]]).mean() < 0.06


def test_a_step_has_four_views_of_each_object_with_one_caption_and_one_t(work, tokens):
    data, model = Latents(work, tokens), small(tokens)
    drawn = model.drawn(data, 0, 3, 12)
    t = model.times(drawn.rng, len(drawn.z))
    groups = (drawn.z[:, 0, 0, 0], drawn.z[:, 2, 0, 0], drawn.ids.float().mean(1), t)
    for each in groups:  # object, background, caption, time
        assert (each.reshape(3, 4) == each.reshape(3, 4)[:, :1]).all()
    held = (drawn.z[:, 1, 0, 0] * 100).round() % 25 == 24
    assert not held.any()
    assert len(drawn.cameras.unique(dim=0)) > 4
    again = small(tokens).drawn(Latents(work, tokens), 0, 3, 12)
    assert torch.equal(drawn.z, again.z) and torch.equal(drawn.noise, again.noise)


def test_it_begins_as_the_unet_of_one_view_but_for_the_attention(tmp_path, tokens, monkeypatch):
    base = diffusion.Model(tokens, **SHAPE)
    monkeypatch.setattr(multiview.Model, "base", lambda self, work: base)
    model = small(tokens, seed=1)
    model.begin(tmp_path)
    z = torch.randn(1, autoencoder.LATENT_CHANNELS, 4, 4).repeat(4, 1, 1, 1)
    ids = torch.ones(4, latents.LENGTH, dtype=torch.long)
    cameras = torch.tensor(world.cameras(4))
    t = torch.full((4,), 500)
    with torch.no_grad():  # four equal views attend to themselves as one does
        found, wanted = model(z, t, ids, cameras), base(z, t, ids)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_training_that_is_interrupted_is_one_that_was_not(work, tokens, tmp_path, monkeypatch):
    """And it learns: the loss is below that of its first weights."""
    monkeypatch.setattr(multiview.Model, "begin", lambda self, work: None)
    monkeypatch.setattr(multiview.Model, "watch", lambda *_: None)
    data = Latents(work, tokens)

    def steps(folder, *untils):
        folder.mkdir()
        for until in untils:
            model = small(tokens)

            def loss(step, model=model):
                drawn = model.drawn(data, 0, step, 8)
                t = model.times(drawn.rng, len(drawn.z))
                noisy, target = model.noised(drawn.z, drawn.noise, t)
                made = model(noisy, t, drawn.ids, drawn.cameras)
                return (made - target).square().mean()

            run = training.Training(folder / "s.pt", model, loss, 6, peak=3e-3, warm=1, muon=True)
            first = loss(0).item()
            run.run(until=until)
        return model, first, loss(0).item()

    one, before, after = steps(tmp_path / "a", 6)
    two, _, _ = steps(tmp_path / "b", 2, 6)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert after < before
    assert one.unet.class_embedding.linear_2.weight.abs().max() > 0


@pytest.mark.slow
def test_the_stages_train_and_save_a_folder_of_the_multi_view_family(work, tmp_path):
    shutil.copytree(work, tmp_path / "work")
    there = tmp_path / "work"
    for file in (there / "latents").glob("*.npy"):  # of the size that the model is made for
        np.save(file, np.load(file).repeat(4, 3).repeat(4, 4))
    training.save_state(there / "vae.pt", model=autoencoder.build().state_dict())
    tokens = latents.tokenizer(there)
    torch.manual_seed(0)
    base = diffusion.Model(tokens)
    training.save_state(there / "unet_state.pt", model=base.state_dict())
    arguments = ["--work", str(there), "--views-steps", "1", "--batch", "4", "--threads", "1"]
    make.main([*arguments, "--stages", "views", "--views-out", str(tmp_path / "out")])
    make.main([*arguments, "--stages", "save-views", "--views-out", str(tmp_path / "out")])
    assert list((there / "sheets").glob("views-*.png"))
    loaded = load_model(str(tmp_path / "out"), device="cpu", cameras="tokens")
    assert loaded.views == 4
    ours = diffusion.load_averaged(there, "views", multiview.Model(tokens)).half().float()
    z = torch.randn(4, autoencoder.LATENT_CHANNELS, 16, 16)
    cameras, t = torch.tensor(world.cameras(4)), torch.full((4,), 600)
    ids = tokens(["a hamburger"] * 4, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        texts = ours.text_encoder(ids)[0]
        found = loaded.predict(z, t, texts, multiview.Cameras(*cameras[:, :3].unbind(-1)))
        v = ours(z, t, ids, cameras)
        wanted = loaded.schedule.to_noise(v, z, t, "v_prediction")
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    assert found.std() > 0
