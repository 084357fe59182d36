"""How the models of the pocket world's objects are trained: reading, resuming, packing."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from pocket import (
    autoencoder,
    data,
    diffusion,
    fast,
    flow,
    latents,
    make,
    muon,
    pack,
    recipes,
    training,
)
from pocket.diffusion import Model, build_unet, load_averaged
from pocket.latents import Latents
from pocket.tokenizer import save_tokenizer
from pocket.tools import CameraTokens
from pocket.world import view_of

SERIES = (("hamburger", ""), ("armchair", ""), ("armchair", "red"))
VIEWS = 50


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokens"), latents.WORDS, latents.LENGTH)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Renders of 8 x 8 pixels and latents of 4 x 4, all random."""
    folder, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(0)
    for slug, colour in SERIES:
        there = folder / "renders" / slug
        there.mkdir(parents=True, exist_ok=True)
        low, high = (-10, -180, 3.2, 36), (89, 180, 4.0, 44)
        if not colour:
            np.save(there / "cameras.npy", rng.uniform(low, high, (VIEWS, 4)).astype(np.float32))
        name = f"rgba-{colour}.npy" if colour else "rgba.npy"
        np.save(there / name, rng.integers(0, 256, (VIEWS, 8, 8, 4), dtype=np.uint8))
        (folder / "latents").mkdir(exist_ok=True)
        key = f"{slug}-{colour}" if colour else slug
        z = rng.normal(size=(VIEWS, 2, autoencoder.LATENT_CHANNELS, 4, 4)).clip(-5, 5)
        np.save(folder / "latents" / f"{key}.npy", z.astype(np.float16))
    return folder


def small_training(folder, steps, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(step):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.prod(1, keepdim=True)).square().mean()

    return training.Training(folder / "state.pt", model, loss, steps, peak=1e-2, warm=3)


def same(a, b):
    a, b = (t.models.state_dict() for t in (a, b)), (t.average.shadow_params for t in (a, b))
    weights = all(torch.equal(x, y) for x, y in zip(*(s.values() for s in a), strict=True))
    return weights and all(torch.equal(x, y) for x, y in zip(*b, strict=True))


def test_an_interrupted_training_gives_the_weights_of_one_that_was_not(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = small_training(tmp_path / "a", 40)
    whole.run()
    for until in (13, 35, 40):  # in the constant part, and in the last fifth
        parted = small_training(tmp_path / "b", 40, seed=0 if until == 13 else 1)
        parted.run(until=until)
    assert same(whole, parted)


def test_more_steps_go_on_from_the_end_of_the_constant_rate(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = small_training(tmp_path / "a", 60)
    whole.run()
    small_training(tmp_path / "b", 40).run()
    longer = small_training(tmp_path / "b", 60)
    assert longer.step == 32
    longer.run()
    assert same(whole, longer)


def test_fewer_steps_than_a_training_has_are_refused(tmp_path):
    small_training(tmp_path, 40).run(until=20)
    with pytest.raises(ValueError, match="has 20 steps already"):
        small_training(tmp_path, 10)


def test_the_rate_rises_stays_and_falls_to_nothing():
    rates = [training.rate(k, 100, 80, 10) for k in range(101)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - k / 20 for k in range(21)])


def test_a_training_that_is_told_to_stop_saves_its_state(tmp_path):
    import os
    import signal

    stopped = small_training(tmp_path, 40)
    inner = stopped.loss

    def loss(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(step)

    stopped.loss = loss
    with pytest.raises(KeyboardInterrupt, match="saved at step 8 of 40"):
        stopped.run()
    assert small_training(tmp_path, 40).step == 8


def test_held_out_views_are_every_twenty_fifth_and_never_drawn(work):
    renders = data.Renders(work / "renders")
    assert [tuple(row) for row in renders.held_out] == [(i, v) for v in (24, 49) for i in range(3)]
    drawn = {tuple(row) for row in renders.draw(np.random.default_rng(0), 2000)}
    assert drawn == {(i, v) for i in range(3) for v in range(VIEWS) if v % 25 != 24}


def test_an_object_in_two_colours_is_drawn_as_often_as_the_root_of_two(work):
    weights = data.Renders(work / "renders").weights()  # armchair, armchair-red, hamburger
    assert weights == pytest.approx(np.array([0.5, 0.5, 0.5**0.5]) / (1 + 0.5**0.5))


def test_a_picture_lies_over_its_background_by_its_opacity():
    rgba = np.array([[[[60, 30, 0, 128]]]], np.uint8)
    picture = data.compose(rgba, [[1.0, 0.5, 0.0]])
    behind = (1 - 128 / 255) * np.array([1.0, 0.5, 0.0])
    expected = 2 * (np.array([60, 30, 0]) / 255 + behind) - 1
    assert picture.flatten().numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "array", [np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 8, 8, 4), np.float32)]
)
def test_a_file_of_another_kind_is_refused_by_its_name(tmp_path, array):
    there = tmp_path / "hamburger"
    there.mkdir()
    np.save(there / "cameras.npy", np.zeros((3, 4), np.float32))
    np.save(there / "rgba.npy", array)
    with pytest.raises(ValueError, match=r"rgba.npy holds .*: render the object again"):
        data.Renders(tmp_path)


def test_a_folder_without_renders_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no renders under"):
        data.Renders(tmp_path)


def test_objects_that_come_out_worst_are_drawn_more_often_within_bounds(work):
    pictures = autoencoder.Pictures(data.Renders(work / "renders"), 0, 4)
    pictures.errors.update({"hamburger ": 1.0, "armchair ": 0.01, "armchair red": 0.1})
    share = pictures.weights() / pictures.renders.weights()
    assert share / share[1] == pytest.approx([1.0, 1.0, 3.0])  # 0.6, 0.6 and 1.8 of the mean


def test_latents_go_with_the_camera_and_colour_of_their_view(work, tokens):
    known = Latents(work, tokens)
    assert known.series == [("armchair", ""), ("armchair", "red"), ("hamburger", "")]
    rng = np.random.default_rng(0)
    cameras = np.load(work / "renders" / "hamburger" / "cameras.npy")
    names = ("side", "front", "back", "overhead")
    for view in range(20):
        said = names[view_of(*cameras[view, :2])]
        assert known.text(rng, (2, view), True, "{}") == f"a hamburger, {said} view"
    assert known.text(rng, (1, 3), False, "{}") == "a red armchair"
    assert known.text(rng, (0, 3), False, "{}") == "an armchair"
    assert torch.equal(known.cameras_of([(2, 5)])[0], torch.from_numpy(cameras[5]))


def test_rows_view_words_and_captions_are_left_out_as_often_as_said(work, tokens):
    known = Latents(work, tokens)
    batches = [known.draw(0, step, 8) for step in range(400)]
    absent = np.mean([b.cameras is None for b in batches])
    assert absent == pytest.approx(latents.NO_ROWS, abs=0.06)
    empty = known.ids([""])[0]
    view = known.tokenizer("view").input_ids[1]
    for rows in (True, False):
        ids = torch.cat([b.ids for b in batches if (b.cameras is not None) == rows])
        none = (ids == empty).all(1)
        assert none.float().mean() == pytest.approx(latents.EMPTY, abs=0.03)
        unsaid = 1 - (ids[~none] == view).any(1).float().mean()
        assert unsaid == pytest.approx(latents.UNSAID[rows], abs=0.04)


def test_a_step_is_drawn_alike_each_time(work, tokens):
    first, again = Latents(work, tokens).draw(3, 9, 5), Latents(work, tokens).draw(3, 9, 5)
    assert torch.equal(first.z, again.z) and torch.equal(first.noise, again.noise)
    assert torch.equal(first.ids, again.ids)


def test_each_word_of_a_caption_is_one_token(tokens):
    for word in filter(str.isalpha, latents.WORDS):
        assert len(tokens(word).input_ids) == 3, word


def small_unet():
    torch.manual_seed(0)
    return build_unet((16, 32), 32, 8)


def test_the_fast_network_gives_what_the_plain_one_gives():
    unet, z, rows = small_unet(), torch.randn(2, 8, 8, 8), torch.randn(2, 5, 32)
    with torch.no_grad():
        plain = unet(z, 500, rows).sample
        with fast.fast(unet):
            quick = unet(z, 500, rows).sample
            with torch.autocast("cpu", torch.bfloat16):
                half = unet(z, 500, rows).sample.float()
    assert torch.allclose(quick, plain, atol=1e-5)
    assert (half - plain).square().mean().sqrt() < 0.03 * plain.square().mean().sqrt()


def test_the_fast_way_is_of_one_network_and_ends_with_its_block():
    unet, other = small_unet(), small_unet()
    kinds = {name: type(p) for name, p in unet.attn_processors.items()}
    with fast.fast(unet):
        inside = {name: type(p) for name, p in unet.attn_processors.items()}
        changed = [m for m in other.modules() if "forward" in vars(m)]
        assert {name: type(p) for name, p in other.attn_processors.items()} == kinds
    assert inside != kinds and not changed
    assert {name: type(p) for name, p in unet.attn_processors.items()} == kinds
    assert not [m for m in unet.modules() if "forward" in vars(m)]


def test_the_rows_of_a_camera_follow_those_of_the_text(tokens):
    torch.manual_seed(0)
    model = Model(tokens, (16, 32), 32, 8).eval()
    seen = []
    model.unet.forward = lambda noisy, t, rows: seen.append(rows) or type("Out", (), {"sample": 0})
    ids, cameras = torch.zeros(2, latents.LENGTH, dtype=torch.long), torch.rand(2, 4)
    with torch.no_grad():
        model(None, None, ids)
        model(None, None, ids, cameras)
        rows = model.camera_encoder(cameras)
    assert torch.equal(seen[1][:, : latents.LENGTH], seen[0])
    assert torch.equal(seen[1][:, latents.LENGTH :], rows)


@pytest.mark.parametrize("kind", [Model, flow.Model])
def test_a_perfect_prediction_is_sampled_back_to_its_latents(tokens, kind):
    shape = {"channels": (16, 32), "width": 32, "size": 4} if kind is Model else {"size": 4}
    model = kind(tokens, **shape).eval()
    z = torch.randn(1, autoencoder.LATENT_CHANNELS, 4, 4)

    def perfect(x, t, ids, cameras=None):  # the noise that would lead from z to x
        if kind is Model:
            alpha = model.scheduler.alphas_cumprod[t].sqrt()
            noise = (x - alpha * z) / (1 - alpha**2).sqrt()
            return alpha * noise - (1 - alpha**2).sqrt() * z
        part = t[:, None, None, None]
        return (x - (1 - part) * z) / part - z

    model.forward = perfect
    made = model.sample(torch.zeros(2, latents.LENGTH), None, 2.0, seed=0)
    assert torch.allclose(made, z, atol=0.02)


def test_one_row_of_zeros_stands_for_as_many_as_it_is_told(tokens):
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    torch.manual_seed(0)
    network = flow.build_transformer(layers=2, heads=1, size=8)
    for parameter in network.parameters():  # it begins as 0
        nn.init.normal_(parameter, std=0.2)
    z, t = torch.randn(2, autoencoder.LATENT_CHANNELS, 8, 8), torch.tensor([300.0, 700.0])
    width = sum(flow.WIDTHS)
    said, seen, pooled = torch.randn(2, 5, width), torch.randn(2, 2, width), torch.randn(2, width)
    processor = flow.ZeroRows()
    network.set_attn_processor(processor)
    processor.count, processor.after = 40.0, 2
    with torch.no_grad():
        rows = torch.cat([said, torch.zeros(2, 1, width), seen], 1)
        short = network(z, rows, pooled, t).sample
        network.set_attn_processor(JointAttnProcessor2_0())
        rows = torch.cat([said, torch.zeros(2, 40, width), seen], 1)
        long = network(z, rows, pooled, t).sample
    assert torch.allclose(short, long, atol=1e-4 * long.abs().max())
    assert not torch.allclose(short, z, atol=0.1)


def test_a_pack_brings_latents_and_cameras_there(work, tmp_path):
    training.save_state(work / "vae.pt", model=autoencoder.build().state_dict())
    (work / "made_with.json").write_text('{"render": {"pixels": 8}}')
    views = pack.make(work, tmp_path / "pack.safetensors", 40)
    pack.unpack(tmp_path / "pack.safetensors", tmp_path / "there")
    assert views == VIEWS
    assert recipes.read(tmp_path / "there") == {"render": {"pixels": 8}}
    for file in (work / "latents").glob("*.npy"):
        sent, came = np.load(file), np.load(tmp_path / "there" / "latents" / file.name)
        assert np.abs(sent[:, 0] - came[:, 0]).max() <= pack.STEP / 2 + 2e-3
        assert np.abs(sent[::4, 1] - came[::4, 1]).max() <= pack.STEP / 2 + 2e-3
        assert np.array_equal(came[1::4, 0], came[1::4, 1])
    for slug in ("hamburger", "armchair"):
        name = f"renders/{slug}/cameras.npy"
        assert np.array_equal(np.load(work / name), np.load(tmp_path / "there" / name))


def test_averaged_weights_come_back_in_parts_and_replace_none_that_saw_more(
    tmp_path, tokens, monkeypatch
):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    monkeypatch.setattr(pack, "PART", 1 << 18)
    torch.manual_seed(0)
    model = Model(tokens, (16, 32), 32, 8)

    def loss(step):
        return sum(p.square().sum() for p in model.parameters())

    training.Training(there / "unet_state.pt", model, loss, 3, peak=1e-2).run()
    (there / "made_with.json").write_text('{"unet": {"seed": 5}, "vae": {"seed": 1}}')
    assert len(pack.weights(there, "unet", tmp_path / "out")) > 1
    assert pack.take(here, "unet", tmp_path / "out") == 3
    assert recipes.read(here) == {"unet": {"seed": 5}}
    sent = load_averaged(there, "unet", Model(tokens, (16, 32), 32, 8))
    came = load_averaged(here, "unet", Model(tokens, (16, 32), 32, 8))
    for a, b in zip(sent.parameters(), came.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="has seen more than 2 steps"):
        state = training.load_state(there / "unet_state.pt")
        training.save_state(there / "unet_state.pt", **{**state, "step": 2})
        pack.weights(there, "unet", tmp_path / "out")
        pack.take(here, "unet", tmp_path / "out")
    (here / "made_with.json").write_text('{"unet": {"seed": 4}}')
    with pytest.raises(ValueError, match="the stage unet was made with seed 4, not 5"):
        pack.take(here, "unet", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "vea"], "vea is not of render, truth, vae"),
        (["--unet-steps", "0"], "--unet-steps"),
        (["--stages", "latents"], "no renders under"),
        (["--stages", "unet"], "no latents yet: run the stage latents first"),
        (["--stages", "save"], "run the stage unet first"),
        (["--stages", "flow", "--seed", "1"], "the stage flow was made with seed 0, not 1"),
    ],
)
def test_what_cannot_be_made_is_one_line(tmp_path, capsys, arguments, message):
    recipe = {"seed": 0, "channels": [flow.LAYERS_OF_TRANSFORMER, flow.HEADS]}
    (tmp_path / "made_with.json").write_text(json.dumps({"flow": recipe}))
    (tmp_path / "flow_state.pt").touch()
    with pytest.raises(SystemExit) as stop:
        make.main(["--work", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def a_state(work, name, model):
    """The state of one step on the weights of ``model``."""
    training.save_state(work / "vae.pt", model=autoencoder.build().state_dict())

    def loss(step):
        return sum(p.square().mean() for p in model.parameters())

    training.Training(work / f"{name}_state.pt", model, loss, 1, peak=1e-3).run()


@pytest.mark.slow
def test_the_folder_of_the_unet_is_one_of_stock_diffusers(tmp_path, tokens):
    from diffusers import StableDiffusionPipeline

    a_state(tmp_path, "unet", Model(tokens))
    diffusion.save_pipeline(tmp_path, tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a hamburger", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (128, 128, 3)
    ours = load_averaged(tmp_path, "unet", Model(tokens))
    theirs = dict(pipeline.unet.named_parameters())
    for name, value in ours.unet.named_parameters():
        assert torch.equal(theirs[name], value.half().float())
    camera = CameraTokens.load(tmp_path / "out")
    for name, value in ours.camera_encoder.state_dict().items():
        assert torch.equal(camera.state_dict()[name], value)
    words = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert "teddy bear" in words["objects"] and "red" in words["colors"]
    size = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert size <= 40 << 20


@pytest.mark.slow
def test_the_folder_of_the_flow_model_says_the_same_in_stock_diffusers(tmp_path, tokens):
    from diffusers import StableDiffusion3Pipeline

    torch.manual_seed(0)
    model = flow.Model(tokens)
    for parameter in model.transformer.parameters():  # it begins as 0
        nn.init.normal_(parameter, std=0.02)
    a_state(tmp_path, "flow", model)
    flow.save_pipeline(tmp_path, tmp_path / "out")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    said, _, pooled, _ = pipeline.encode_prompt("a red armchair", None, None)
    ours = load_averaged(tmp_path, "flow", flow.Model(tokens)).half().float()
    ids = tokens("a red armchair", padding="max_length", return_tensors="pt").input_ids
    z = torch.randn(1, autoencoder.LATENT_CHANNELS, 16, 16)
    with torch.no_grad():
        theirs = pipeline.transformer(z, said, pooled, torch.tensor([300.0])).sample
        ours.train()
        ours.count = flow.ZERO_ROWS
        made = ours(z, torch.tensor([0.3]), ids)
    assert said.shape[1] == latents.LENGTH + flow.ZERO_ROWS
    assert torch.allclose(made, theirs, atol=1e-3 * theirs.abs().max())
    assert theirs.std() > 1e-3


def test_muon_steps_the_matrix_of_a_convolution_to_singular_values_of_one_size():
    network = nn.Sequential(nn.Conv2d(32, 48, 3)).to(memory_format=torch.channels_last)
    optimizer = muon.MuonAndAdamW(network, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    before = network[0].weight.detach().clone()
    torch.manual_seed(0)
    network[0].weight.grad = torch.randn(48, 32, 3, 3)
    optimizer.step()
    moved = (network[0].weight.detach() - before).permute(0, 2, 3, 1).reshape(48, -1)
    values = torch.linalg.svdvals(moved) / (0.2 * (32 * 9) ** 0.5)
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_leaves_to_adamw_what_is_no_matrix_of_a_hidden_layer(tokens):
    model = Model(tokens)
    for name, parameter in model.named_parameters():
        taken = muon.is_matrix(name, parameter)
        if parameter.ndim < 2 or name.endswith(("conv_in.weight", "conv_out.weight")):
            assert not taken
        if "to_q" in name or name.endswith("conv1.weight"):
            assert taken


def test_a_training_with_muon_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    def trained(folder, *until):
        for end in until:
            training = wide_training(folder)
            training.run(until=end)
        return training

    assert same(trained(tmp_path / "a", 6), trained(tmp_path / "b", 3, 6))


def wide_training(folder):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 1))

    def loss(step):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.prod(1, keepdim=True)).square().mean()

    return training.Training(folder / "state.pt", model, loss, 8, peak=1e-2, warm=3, muon=True)


def test_a_state_of_adamw_alone_leaves_muon_as_it_began():
    model = nn.Linear(64, 64)
    optimizer = muon.MuonAndAdamW(model, 1e-3, (0.9, 0.99), 0.0)
    before = optimizer.state_dict()
    optimizer.load_state_dict(torch.optim.AdamW(model.parameters(), lr=0.5).state_dict())
    assert optimizer.state_dict() == before
