"""The family of methods: limits in which one is another, and each by its pieces."""

import itertools
import math

import pytest
import torch
from lods.cameras import Cameras
from lods.methods.conditions import Conditions

from tests.guidance_oracles import (
    random_prompt,
    side_view,
)
from tests.methods.family import SHORT, call, close, g, latents, make, part, pieces, shake

__all__ = ["make"]  # a fixture


def test_csd_is_lods_at_infinity_with_a_frozen_null(make):
    want = g(make("csd"), random_prompt())
    for short in ("embedding", "lora"):
        close(g(make(short, guidance_scale=math.inf), random_prompt()), want)


@pytest.mark.parametrize("short", ["embedding", "lora", "lora of another model"])
def test_lods_towards_guided_samples(make, tiny_sd, short):
    """``prompt_scale`` r: cfg_r(eps_c, eps_n) in place of eps_c, in the same calls."""
    fields = {"guidance_scale": 5.0, "weighting_strategy": "uniform"}
    if short.endswith("model"):
        fields["pretrained_model_name_or_path_lora"] = tiny_sd(sample_size=4, seed=1)
    prompt, kind = random_prompt(), short.split()[0]
    published, guided = make(kind, **fields), make(kind, prompt_scale=3.0, **fields)
    published.initialize(prompt)
    shake(published.parameters())
    guided.load_state_dict(published.state_dict())
    texts = prompt.text_embeddings, prompt.uncond_text_embeddings
    _, _, _, eps_c, eps_n = pieces(guided, prompt, *texts)
    difference = g(guided, prompt) - g(published, prompt)
    close(difference, eps_n + 3 * (eps_c - eps_n) - eps_c)
    rows = []
    guided.model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    g(guided, prompt)
    assert rows == [4 if short.endswith("model") else 6]


def test_a_bridge_from_the_null_is_csd(make):
    prompt = random_prompt()
    source = prompt.others["source"]
    other = g(make("bridge"), prompt)
    prompt.others["source"] = prompt.uncond_text_embeddings[0]
    csd = g(make("csd"), prompt)
    close(g(make("bridge"), prompt), csd)
    assert (other - csd).abs().max() > 1e-2
    w, _, _, eps_c, eps_s = pieces(make("csd"), prompt, prompt.text_embeddings, source)
    close(other, w * (eps_c - eps_s))


@pytest.mark.parametrize("short", SHORT)
def test_a_method_may_start_as_sds_over_its_scale(make, short):
    """Before ``sds_steps`` every method has SDS' gradient, whatever it has learned, and learns."""
    first = {"sds_steps": 3, "sds_scale": 20.0}
    if short == "bridge":
        first = {"bridge_start": 3, "bridge_sds_scale": 20.0}
    prompt, plain = random_prompt(), make(short)
    plain.initialize(prompt)
    shake(plain.parameters())
    guidance = make(short, **first)
    guidance.load_state_dict(plain.state_dict())
    sds, own = g(make("sds", guidance_scale=20.0), prompt) / 20, g(plain, prompt)
    assert (sds - own).abs().max() > 1e-2
    sds = sds * (guidance.cfg.guidance_scale if guidance.grows_with_scale else 1)
    for step, want in ((0, sds), (2, sds), (3, own), (9, own)):
        guidance.do_update_step(0, step)
        close(g(guidance, prompt), want)
    guidance.do_update_step(0, 0)
    losses = {name for name in call(guidance, prompt) if name.startswith("loss_")}
    assert losses == {name for name in call(plain, prompt) if name.startswith("loss_")}


def test_vsd_starts_at_the_model_itself(make):
    prompt = random_prompt()
    guidance = make("vsd")
    w, _, _, eps_c, eps_u = pieces(
        guidance, prompt, prompt.text_embeddings, prompt.uncond_text_embeddings
    )
    start = g(guidance, prompt, c2w=torch.rand(2, 4, 4))
    close(start, w * (eps_u + 7.5 * (eps_c - eps_u) - eps_c))


def test_vsd_rows_of_one_call(make, monkeypatch):
    """LoRA and camera act in the rows of the learned prediction only, each row with its own."""
    guidance, prompt = make("vsd"), random_prompt()
    shake([*guidance.lora.parameters(), *guidance.camera.parameters()])
    y = prompt.text_embeddings.expand(2, -1, -1)
    cameras = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3))
    w, eps, t, eps_c, eps_u = pieces(
        guidance, prompt, prompt.text_embeddings, prompt.uncond_text_embeddings
    )
    x_t = guidance.model.add_noise(latents(), eps, t)
    rows = []
    for i in range(2):
        with torch.no_grad(), guidance.camera.rows(cameras[[i]].flatten(1)):
            rows.append(guidance.predict_learned(x_t[[i]], t[[i]], y[[i]]))
    eps_lora = torch.cat(rows)
    assert (eps_lora - eps_c).abs().max() > 1e-2
    close(g(guidance, prompt, c2w=cameras), w * (eps_u + 7.5 * (eps_c - eps_u) - eps_lora))
    # another camera, and none (2D), are something else
    results = [g(guidance, prompt, c2w=cameras), g(guidance, prompt, c2w=cameras + 1)]
    results += [g(guidance, prompt), g(guidance, prompt, c2w=torch.zeros(2, 4, 4))]
    assert (results[0] - results[1]).abs().max() > 1e-4 < (results[0] - results[2]).abs().max()
    assert torch.equal(results[2], results[3])
    mvp = make("vsd", camera_condition_type="mvp")
    mvp.load_state_dict(guidance.state_dict())
    both = {"mvp_mtx": cameras, "c2w": cameras + 1}
    assert torch.equal(g(mvp, prompt, **both), results[0])
    # and so for the cameras of a batch
    seen, rows = [], guidance.camera.rows
    monkeypatch.setattr(guidance.camera, "rows", lambda c, *at: seen.append(c) or rows(c, *at))
    call(guidance, prompt, c2w=cameras)
    assert torch.equal(seen[-1], cameras.flatten(1))


def test_vsd_in_another_model(make, tiny_sd):
    other = make("vsd", pretrained_model_name_or_path_lora=tiny_sd(sample_size=4, seed=1))
    same = make("vsd", pretrained_model_name_or_path=tiny_sd(sample_size=4, seed=1))
    shake([*other.lora.parameters(), *other.camera.parameters()])
    same.load_state_dict(other.state_dict())
    prompt, cameras = random_prompt(), torch.ones(2, 16)
    y = prompt.text_embeddings.expand(2, -1, -1)
    w, eps, t, eps_c, eps_u = pieces(
        other, prompt, prompt.text_embeddings, prompt.uncond_text_embeddings
    )
    with torch.no_grad(), same.camera.rows(cameras):
        x_t = other.model.add_noise(latents(), eps, t)
        eps_lora = same.predict_learned(x_t, t, y)
    got = g(other, prompt, c2w=cameras.view(2, 4, 4))
    close(got, w * (eps_u + 7.5 * (eps_c - eps_u) - eps_lora))


@pytest.mark.parametrize("dropped", [True, False])
def test_vsd_learns_without_a_camera_in_a_tenth_of_the_rows(make, monkeypatch, dropped):
    guidance, seen = make("vsd", lora_cfg_training=dropped, lora_n_timestamp_samples=400), []
    monkeypatch.setattr(
        guidance.method, "predict_learned", lambda x, t, y, cameras: torch.zeros_like(x)
    )
    rows = guidance.camera.rows
    monkeypatch.setattr(guidance.camera, "rows", lambda c: seen.append(c) or rows(c))
    texts = random_prompt().get_text_embeddings(*side_view(2)).chunk(2)
    cameras = Cameras(*side_view(2), c2w=torch.arange(1.0, 33).view(2, 4, 4))
    guidance.learn(latents(), Conditions(*texts, cameras=cameras))
    none = (seen[0] == 0).all(1)
    assert 40 < none.sum() < 130 if dropped else none.sum() == 0
    rows = torch.arange(800)  # image i is row i, i + 2, ...
    want = torch.arange(1.0, 33).view(2, 16)[rows % 2]
    assert torch.equal(seen[0][~none], want[~none])


def test_vsd_saves_the_lora_and_keeps_the_camera(make, tmp_path):
    """lora_scale is 1 there: the file holds the LoRA as it is."""
    guidance = make("vsd")
    shake([*guidance.lora.parameters(), *guidance.camera.parameters()])
    path = guidance.save_learned(tmp_path / "lora.safetensors")
    again = make("vsd", weights=str(path))
    assert guidance.cfg.lora_scale == 1 and make("lora").cfg.lora_scale == 0.5
    for one, other in zip(again.lora.parameters(), guidance.lora.parameters()):
        torch.testing.assert_close(one, other)
    assert not again.camera.linear_2.weight.any()
    keys = set(guidance.state_dict())
    assert {"camera.linear_1.weight", "camera.linear_2.bias"} < keys
    assert all(key.startswith(("lora.", "camera.")) for key in keys)


def test_nfsd_is_its_pieces(make):
    prompt = random_prompt()
    texts = (prompt.text_embeddings, prompt.uncond_text_embeddings, prompt.others["nfsd_negative"])
    for threshold in (0.0, 0.2, 1.0):
        guidance = make("nfsd", nfsd_threshold=threshold, guidance_scale=3.0)
        for seed in range(4):
            w, _, t, eps_c, eps_u, bad = pieces(guidance, prompt, *texts, seed=seed)
            low = (t < 1000 * threshold).view(2, 1, 1, 1)
            domain = torch.where(low, eps_u, eps_u - bad)
            close(g(guidance, prompt, seed=seed), w * (domain + 3 * (eps_c - eps_u)))


def test_sdi_with_drawn_noise_is_sds(make, monkeypatch):
    guidance, prompt, base = make("sdi"), random_prompt(), part("methods.base").Method
    want = g(make("sds"), prompt)
    assert (g(guidance, prompt) - want).abs().max() > 1e-2
    method = guidance.method
    monkeypatch.setattr(method, "diffuse", lambda *args: base.diffuse(method, *args))
    assert torch.equal(g(guidance, prompt), want)


def test_sdi_compares_with_the_noise_that_it_has_found(make):
    """x_t is made of the latents and the found noise; by hand, for two rows of other t."""
    guidance, prompt, z = make("sdi", inversion_steps=3), random_prompt(), latents()
    y, null = prompt.get_text_embeddings(*side_view(2)).chunk(2)
    t = torch.tensor([30, 900])
    with torch.no_grad():
        x_t, eps = guidance.diffuse(z, t, Conditions(y, null))
        torch.testing.assert_close(guidance.model.add_noise(z, eps, t), x_t)
        for row, grid in enumerate(([0, 10, 20, 30], [0, 300, 600, 900])):
            x, alpha, sigma = z[[row]], torch.tensor(1.0), torch.tensor(0.0)
            for low, high in itertools.pairwise(grid):
                at = torch.tensor([low])
                e_c, e_u = (guidance.model.predict(x, at, e[[row]]) for e in (y, null))
                e = e_u - 7.5 * (e_c - e_u)
                abar = guidance.model.schedule.alphas_cumprod[high]
                x = abar.sqrt() * (x - sigma * e) / alpha + (1 - abar).sqrt() * e
                alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
            torch.testing.assert_close(x_t[[row]], x, rtol=1e-3, atol=1e-4)


def test_ism_by_hand(make):
    guidance, prompt, z = make("ism", ism_delta_t=50, ism_delta_s=200), random_prompt(), latents()
    y, null = prompt.get_text_embeddings(*side_view(2)).chunk(2)
    t = torch.tensor([20, 500])
    with torch.no_grad():
        x_t, eps = guidance.diffuse(z, t, Conditions(y, null))
        for row, grid in enumerate(([0, 0, 20], [0, 200, 400, 450, 500])):
            x, alpha, sigma = z[[row]], torch.tensor(1.0), torch.tensor(0.0)
            for low, high in itertools.pairwise(grid):
                e = guidance.model.predict(x, torch.tensor([low]), null[[row]])
                abar = guidance.model.schedule.alphas_cumprod[high]
                x = abar.sqrt() * (x - sigma * e) / alpha + (1 - abar).sqrt() * e
                alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
            torch.testing.assert_close(x_t[[row]], x, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(eps[[row]], e, rtol=1e-3, atol=1e-4)  # that at s
