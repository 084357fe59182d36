"""The methods that edit: where they vanish, their formulas by hand, their limits, their source."""

import dataclasses

import lods
import pytest
import torch
from lods import preflight, scores
from lods.methods import find, registry
from lods.models import RectifiedFlow, VariancePreserving
from lods.prompts import EmbeddedPrompts, TextSettings

import threestudio
from tests.flow_model import GaussianModel, as_diffusion
from tests.guidance_oracles import PerpNegPrompt, Prompt, random_prompt, side_view
from tests.ideal_model import CHANNELS, SIZE, IdealModel

EDITS = ["dds", "drf", "edit", "pds", "ssd"]
FLOW = RectifiedFlow(3.0)
TABLE = VariancePreserving((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0))


def latents(rows=3, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CHANNELS, SIZE, SIZE, generator=generator)


Z, SOURCE = latents(), latents(seed=5)


def made(name, schedule=TABLE, std=0.5, prompt="a dog", source="a cat", **values):
    method = find(name)(GaussianModel(schedule, std), **values)
    settings = TextSettings(view_dependent_prompting=False, source_prompt=source)
    method.start(EmbeddedPrompts(method.model, prompt, "n", settings))
    return method


def gradient(method, z=Z, source=SOURCE, seed=1):
    """The gradient of loss_sds with respect to the latents, times their number; nothing learns."""
    z, method.learn = z.clone().requires_grad_(), lambda *args: {}
    torch.manual_seed(seed)
    loss = method(latents=z, source_latents=source).terms["loss_sds"]
    return torch.autograd.grad(loss, z)[0] * len(z)


class Drawn:
    """What a method draws for ``gradient(..., seed)``, and what the model says to it."""

    def __init__(self, method, z=Z, source=SOURCE, seed=1):
        self.model = method.model
        torch.manual_seed(seed)
        bounds = method.min_step, method.max_step
        self.t = method.model.schedule.draw(len(z), *bounds, "cpu", "uniform")
        self.eps = torch.randn_like(z)
        self.alpha, self.sigma = (
            scores.rows(a, z) for a in self.model.schedule.alpha_sigma(self.t)
        )
        self.x, self.x_source = (self.alpha * v + self.sigma * self.eps for v in (z, source))

    def sees(self, x, text):
        rows = self.model.text([text]).expand(len(x), -1, -1)
        return self.model.predict(x, self.t, rows)

    def guided(self, x, text, s):
        null = self.sees(x, "n")
        return null + s * (self.sees(x, text) - null)


def test_these_are_the_methods_that_edit():
    edits = {name for name, cls in registry.ours().items() if cls.edits}
    assert edits == {f"lods-{name}" for name in EDITS}
    assert set(preflight.EDITING) == {f"{name}-guidance" for name in edits}


# --- nothing to change ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [TABLE, FLOW], ids=["diffusion", "flow"])
@pytest.mark.parametrize("name", EDITS)
def test_no_gradient_where_picture_and_text_are_the_sources(name, schedule):
    same = made(name, schedule, prompt="a cat", source="a cat")
    assert not gradient(same, SOURCE).any()
    assert gradient(same).abs().max() > 1e-2  # another picture
    assert gradient(made(name, schedule), SOURCE).abs().max() > 1e-2  # another text


@pytest.mark.parametrize("name", EDITS)
def test_no_gradient_to_the_last_bit_on_a_network_whose_encoder_draws(name, tiny_sd):
    torch.manual_seed(2)
    method = lods.load(name, tiny_sd(sample_size=4), "a red car", source_prompt="a red car")
    for parameter in method.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images = torch.rand(3, 3, 8, 8)
    assert not torch.equal(method.latents_of(images), method.latents_of(images))
    losses = method(images.requires_grad_(), source=images.detach().clone())
    assert losses.terms["loss_sds"] == 0 and losses.numbers["grad_norm"] == 0
    moved = method(images, source=images.detach().flip(-1))
    assert moved.numbers["grad_norm"] > 1e-3


def test_ssd_as_published_sharpens_what_is_the_source():
    method = made("ssd", prompt="a cat", ssd_published=True)
    seen = Drawn(method, SOURCE)
    want = 6.5 * (seen.sees(seen.x, "a cat") - seen.sees(seen.x, "n"))
    torch.testing.assert_close(gradient(method, SOURCE), want, rtol=1e-4, atol=1e-4)


# --- the formulas ---------------------------------------------------------------------------------


def test_dds_is_the_difference_of_guided_predictions():
    method = made("dds", guidance_scale=5.0, weighting_strategy="sds")
    seen = Drawn(method)
    want = seen.guided(seen.x, "a dog", 5.0) - seen.guided(seen.x_source, "a cat", 5.0)
    torch.testing.assert_close(gradient(method), seen.sigma**2 * want, rtol=1e-4, atol=1e-4)


def test_dds_on_gaussian_pictures_is_known_in_closed_form():
    """eps = sigma d, d = (x - alpha m) / (alpha^2 std^2 + sigma^2), which is linear in x and m."""
    method = made("dds", guidance_scale=4.0)
    seen, text = Drawn(method), method.model.text
    y, y_source, n = (text([t]).view(1, CHANNELS, SIZE, SIZE) for t in ("a dog", "a cat", "n"))
    share = seen.alpha * seen.sigma / (0.25 * seen.alpha**2 + seen.sigma**2)
    want = share * (Z - SOURCE - 4.0 * (y - y_source))
    assert (y - n).abs().max() > 1
    torch.testing.assert_close(gradient(method), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("published", [False, True])
def test_ssd_has_four_differences(published):
    scales = {"guidance_scale": 3.0, "ssd_anchor_scale": 0.5, "ssd_enhance_scale": 2.0}
    method = made("ssd", **scales, ssd_keep_scale=0.1, ssd_published=published)
    seen = Drawn(method)
    y, y_source, n = (seen.sees(seen.x, text) for text in ("a dog", "a cat", "n"))
    there, null_there = (seen.sees(seen.x_source, text) for text in ("a cat", "n"))
    anchor, extra = (null_there, 0) if published else (there, there - null_there)
    want = 0.5 * (y_source - anchor) + 3.0 * (y - y_source) + 2.0 * (y - n - extra)
    want = want + 0.1 * torch.exp(seen.t / 1000).view(-1, 1, 1, 1) * seen.alpha * (Z - SOURCE)
    torch.testing.assert_close(gradient(method), want, rtol=1e-4, atol=1e-4)


def stochastic_latent(seen, z, x, text, s, p, noise):
    """(x_p - mu) / sigma of the paper's code, from the tables of a diffusion in float64."""
    abar = TABLE.alphas_cumprod.double()
    betas = torch.cat([1 - abar[:1], 1 - abar[1:] / abar[:-1]])
    beta, abar_t, abar_p = (scores.rows(v, z.double()) for v in (betas[seen.t], abar[seen.t], p))
    eps = seen.guided(x, text, s).double()
    z_hat = (x - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    mean = abar_p.sqrt() * beta / (1 - abar_t) * z_hat
    mean = mean + (1 - beta).sqrt() * (1 - abar_p) / (1 - abar_t) * x
    x_p = abar_p.sqrt() * z + (1 - abar_p).sqrt() * noise
    return (x_p - mean) / ((1 - abar_p) / (1 - abar_t) * beta).sqrt()


@pytest.mark.parametrize("step", [1, 2, 7])
def test_pds_is_the_difference_of_stochastic_latents(step):
    method = made("pds", guidance_scale=30.0, pds_step=step)
    seen, noise = Drawn(method), latents(seed=8).double()
    p = TABLE.alphas_cumprod.double()[seen.t - step]
    here = stochastic_latent(seen, Z, seen.x, "a dog", 30.0, p, noise)
    there = stochastic_latent(seen, SOURCE, seen.x_source, "a cat", 30.0, p, noise)
    want = (here - there).float()
    torch.testing.assert_close(gradient(method), want, rtol=2e-3, atol=2e-3)


def test_pds_of_neighbouring_timesteps_does_not_pull_back():
    t = torch.tensor([1, 20, 500, 980])
    for schedule in (TABLE, FLOW):
        levels = [schedule.alpha_sigma(each) for each in (t, t - 1, t - 1)]
        psi, chi = scores.pds_weights(*levels)
        assert (psi.abs() < 1e-6 * chi).all()
        levels[2] = schedule.alpha_sigma((t - 2).clamp_min(0))
        assert (scores.pds_weights(*levels)[0][1:] > 1e-3 * chi[1:]).all()


def test_pds_has_an_earlier_timestep_for_the_smallest():
    method = made("pds", min_step_percent=0.0, max_step_percent=0.0)
    assert gradient(method).isfinite().all() and gradient(method).any()


# --- delta flow -----------------------------------------------------------------------------------

ALIKE = {"guidance_scale": 6.0}


def test_delta_flow_is_the_difference_of_velocities():
    """By hand, from v alone."""
    method = made("drf", FLOW, drf_shift=0.5, guidance_scale=8.0, drf_source_scale=3.0)
    seen = Drawn(method)
    x = (1 - seen.sigma) * Z + seen.sigma * (seen.eps + 0.5 * (Z - SOURCE))

    def v(x, text, s):
        return (seen.guided(x, text, s) - x) / seen.alpha

    want = v(x, "a dog", 8.0) - v(seen.x_source, "a cat", 3.0) + 0.5 * (Z - SOURCE)
    torch.testing.assert_close(gradient(method), want, rtol=1e-3, atol=1e-3)


def test_delta_flow_is_dds_with_the_weight_of_velocities():
    drf = gradient(made("drf", FLOW, **ALIKE))
    dds = gradient(made("dds", FLOW, weighting_strategy="velocity", **ALIKE))
    torch.testing.assert_close(drf, dds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dds", "drf", "edit", "pds"])
def test_the_same_pictures_as_a_flow_and_as_a_diffusion(name):
    """With the same t and eps, and a weight that no scaling of x_t changes; SSD also compares the
    noised pictures themselves, and PDS two levels that are not neighbours."""
    values = {"std": 0.5, "weighting_strategy": "latent", **ALIKE}
    values |= {"pds_step": 1} if name == "pds" else {}
    flow, diffusion = (gradient(made(name, s, **values)) for s in (FLOW, as_diffusion(FLOW)))
    assert flow.abs().max() > 1e-2
    torch.testing.assert_close(flow, diffusion, rtol=2e-3, atol=2e-3)


def test_delta_flow_equals_dds_on_the_same_pictures_as_a_diffusion():
    """1 / alpha of the flow is the weight, of noise, on the diffusion too."""
    flow = made("drf", FLOW, **ALIKE)
    noise = gradient(made("dds", as_diffusion(FLOW), **ALIKE))
    seen = Drawn(flow)
    torch.testing.assert_close(gradient(flow), noise / seen.alpha, rtol=2e-3, atol=2e-3)


def test_the_shift_of_delta_flow_follows_its_schedule():
    method = made("drf", FLOW, drf_shift=[0, 0.0, 1.0, 50])
    for step, eta in ((0, 0.0), (25, 0.5), (50, 1.0), (90, 1.0)):
        method.step(step)
        assert method.eta == eta


# --- LODS-edit ------------------------------------------------------------------------------------


def test_lods_edit_with_a_null_that_has_not_learned_is_dds_over_its_scale():
    for s in (0.5, 7.5, 1000.0):
        dds = gradient(made("dds", guidance_scale=s)) / s
        got = gradient(made("edit", guidance_scale=s))
        torch.testing.assert_close(got, dds, rtol=1e-4, atol=1e-5)


def wholly_described(name, null, **values):
    """A method on pictures without spread, where the source is the only one of its text."""
    method = find(name)(GaussianModel(TABLE, 0.0), **values)
    settings = TextSettings(view_dependent_prompting=False, source_prompt="a cat")
    method.start(EmbeddedPrompts(method.model, "a dog", null, settings))
    return method, method.model.text(["a cat"]).view(1, CHANNELS, SIZE, SIZE).expand(3, -1, -1, -1)


def test_lods_edit_of_a_source_that_its_texts_describe_wholly_is_sds_over_its_scale():
    method, source = wholly_described("edit", "a cat", guidance_scale=7.5)
    sds, _ = wholly_described("sds", "a cat", **shared(method))
    want = plain(sds) / 7.5
    torch.testing.assert_close(gradient(method, source=source), want, rtol=1e-3, atol=1e-3)
    assert want.abs().max() > 1e-2


def test_lods_edit_of_such_a_source_is_lods_with_what_is_learned():
    method, source = wholly_described("edit", "n", guidance_scale=7.5)
    lods_, _ = wholly_described("embedding", "n", **shared(method), guidance_scale=7.5)
    for each in (method, lods_):  # the learned part has come to know the source
        with torch.no_grad():
            each.learnable_embedding.copy_(each.model.text(["a cat"])[0])
    got = gradient(method, source=source)
    torch.testing.assert_close(got, plain(lods_), rtol=1e-3, atol=1e-3)


def shared(method):
    names = ("min_step_percent", "max_step_percent", "weighting_strategy")
    return {name: getattr(method.cfg, name) for name in names}


def plain(method, seed=1):
    z, method.learn = Z.clone().requires_grad_(), lambda *args: {}
    torch.manual_seed(seed)
    return torch.autograd.grad(method(latents=z).terms["loss_sds"], z)[0] * len(z)


def test_lods_edit_learns_the_source_and_not_the_picture():
    method = made("edit")
    known = method.prompts.conditions(lods.Cameras(*torch.zeros(3, 3)), method.other_texts)
    values = []
    for z, source in ((Z, SOURCE), (SOURCE, SOURCE), (SOURCE, Z)):
        torch.manual_seed(3)
        conditions = dataclasses.replace(known, source=source)
        values.append(method.learn(z, conditions)["loss_embedding"])
    assert values[0] == values[1] != values[2]


def test_lods_edit_towards_guided_samples():
    method, seen = made("edit", prompt_scale=3.0, guidance_scale=5.0), Drawn(made("edit"))
    plain_, difference = made("edit", guidance_scale=5.0), []
    for x, text in ((seen.x, "a dog"), (seen.x_source, "a cat")):
        difference.append(seen.guided(x, text, 3.0) - seen.sees(x, text))
    got = gradient(method) - gradient(plain_)
    torch.testing.assert_close(got, difference[0] - difference[1], rtol=1e-3, atol=1e-3)


# --- the source, as it is given -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "DDS edits a source: give source= (images from the same cameras) or source_latents="),
        ({"source": torch.rand(3, 3, 8, 8), "source_latents": SOURCE}, "DDS edits a source: give"),
        ({"source": torch.rand(3, 8, 8, 3)}, "images are (B, 3, H, W), not (3, 8, 8, 3)"),
        ({"source": torch.full((3, 3, 4, 4), torch.nan)}, "the images hold nan or inf"),
        ({"source_latents": SOURCE[:2]}, "the source has 2 pictures, and 3 are edited: one for"),
        ({"source_latents": SOURCE[0]}, "latents of this model are (B, 3, 4, 4), not (3, 4, 4)"),
    ],
)
def test_a_wrong_source_is_one_line(given, said):
    with pytest.raises(ValueError) as caught:
        made("dds")(latents=Z, **given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_method_that_edits_nothing_takes_no_source():
    method = lods.load("sds", IdealModel(), "a cat")
    with pytest.raises(ValueError, match="SDS edits nothing: leave source out, or take dds"):
        method(latents=Z, source_latents=SOURCE)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_without_a_text_of_its_source_is_refused_before_anything_is_loaded(name):
    with pytest.raises(ValueError, match="give source_prompt='a cat'"):
        lods.load(name, "no/such/model", "a dog")
    method = find(name)(IdealModel())
    with pytest.raises(ValueError, match="give source_prompt='a cat'"):
        method.start(EmbeddedPrompts(method.model, "a dog", "", TextSettings()))


def test_images_and_latents_of_a_source_are_the_same():
    model, images = IdealModel(), torch.rand(3, 3, 4, 4)
    found = []
    for given in ({"source": images}, {"source_latents": model.encode(images)}):
        method = lods.load("dds", model, "a dog", source_prompt="a cat")
        torch.manual_seed(0)
        z = Z.clone().requires_grad_()
        method(latents=z, **given).total.backward()
        found.append(z.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", EDITS)
def test_the_guidance_of_the_host_is_the_method_bit_for_bit(name, tiny_sd):
    folder, views = tiny_sd(sample_size=4), lods.Cameras(*side_view(2))
    method = lods.load(name, folder, "a red car", source_prompt="a blue car")
    guidance = threestudio.find(f"lods-{name}-guidance")({"pretrained_model_name_or_path": folder})
    texts = SameTexts(method.prompts)
    guidance.initialize(texts)
    guidance.load_state_dict(method.state_dict())  # whose keys are the same
    now, before = torch.rand(2, 2, 8, 8, 3, generator=torch.Generator().manual_seed(5))
    results = []
    for host in (True, False):
        rgb = now.clone().requires_grad_()
        torch.manual_seed(6)
        if host:
            out = guidance(rgb, texts, *views.views, source_rgb=before)
            losses = {k: v for k, v in out.items() if k.startswith("loss_")}
        else:
            channels_first = rgb.permute(0, 3, 1, 2)
            losses = method(channels_first, views, source=before.permute(0, 3, 1, 2)).terms
        sum(losses.values()).backward()
        results.append([rgb.grad, *losses.values()])
    assert results[0][0].any() and len(results[0]) == len(results[1])
    for one, other in zip(*results):
        assert torch.equal(one, other)


class SameTexts(Prompt):
    """A prompt processor's output that holds the embeddings of a method of the library."""

    def __init__(self, prompts):
        self.prompts = prompts
        super().__init__(prompts.plain("prompt"), prompts.plain("null"))

    def other_text(self, kind):
        assert kind in ("edited", "source")
        return Rows(self.prompts, kind)

    def get_text_embeddings(self, elevation, azimuth, distances, view_dependent_prompting=True):
        seen = self.prompts.conditions(lods.Cameras(elevation, azimuth, distances))
        return torch.cat([seen.prompt, seen.null])


class Rows(SameTexts):
    def __init__(self, prompts, kind):
        self.prompts, self.kind = prompts, kind
        self.text_embeddings = prompts.plain(kind)[None]

    def get_text_embeddings(self, elevation, azimuth, distances, view_dependent_prompting=True):
        cameras = lods.Cameras(elevation, azimuth, distances)
        seen = self.prompts.conditions(cameras, [self.kind])
        return torch.cat([seen.others[self.kind], seen.null])


def test_a_system_that_gives_no_source_is_told_in_one_line(tiny_sd):
    config = {"pretrained_model_name_or_path": tiny_sd(sample_size=4)}
    guidance = threestudio.find("lods-dds-guidance")(config)
    prompt = random_prompt()
    prompt.others["edited"] = prompt.others["source"]
    with pytest.raises(ValueError, match=r"system\.guidance_type=lods-dds-guidance edits what is"):
        guidance(torch.rand(2, 8, 8, 3), prompt, *side_view(2))


def test_perp_neg_is_refused(tiny_sd):
    config = {"pretrained_model_name_or_path": tiny_sd(sample_size=4)}
    guidance = threestudio.find("lods-dds-guidance")(config)
    base = random_prompt()
    base.others["edited"] = base.others["source"]
    prompt = PerpNegPrompt(base, torch.randn(2, 16, 32), torch.tensor([-1.0, -0.5]))
    prompt.other_text = lambda kind: prompt
    rgb = torch.rand(2, 8, 8, 3)
    with pytest.raises(ValueError, match="DDS compares two texts, and Perp-Neg has negatives"):
        guidance(rgb, prompt, *side_view(2), source_rgb=rgb)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_two_steps_and_a_resumed_one_are_three_steps(name, tmp_path):
    def run(method, z, optimizers, steps):
        for step in steps:
            torch.manual_seed(step)
            method.step(step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            method(latents=z, source_latents=SOURCE).total.backward()
            for optimizer in optimizers:
                optimizer.step()
        return z.detach().clone(), {k: v.clone() for k, v in method.state_dict().items()}

    def fresh(z=SOURCE):
        method = made(name)
        z = z.clone().requires_grad_()
        learned = list(method.parameters())
        optimizers = [torch.optim.SGD([z], lr=0.01)]
        optimizers += [torch.optim.SGD(learned, lr=0.1)] if learned else []
        return method, z, optimizers

    whole = run(*fresh(), range(3))
    torch.save(run(*fresh(), range(2)), tmp_path / "state")
    z, state = torch.load(tmp_path / "state", weights_only=True)
    method, z, optimizers = fresh(z)
    method.load_state_dict(state)
    resumed = run(method, z, optimizers, [2])
    assert torch.equal(whole[0], resumed[0]) and not torch.equal(whole[0], SOURCE)
    assert whole[1].keys() == resumed[1].keys()
    assert all(torch.equal(whole[1][key], resumed[1][key]) for key in whole[1])


def test_a_step_costs_two_calls_of_one_shape():
    for name, calls in (("dds", 2), ("pds", 2), ("drf", 2), ("ssd", 3)):
        method = lods.load(name, IdealModel(), "a dog", source_prompt="a cat")
        method(latents=Z, source_latents=SOURCE)
        assert method.model.rows == [2 * len(Z)] * calls


def test_looking_on_changes_no_bit():
    for name in EDITS:
        found = []
        for watched in (False, True):
            method = lods.load(name, IdealModel(), "a dog", source_prompt="a cat")
            method.watch(watched)
            torch.manual_seed(3)
            z = Z.clone().requires_grad_()
            method(latents=z, source_latents=SOURCE).total.backward()
            found.append(z.grad)
            seen = method.seen()
        assert torch.equal(*found)
        assert "guess under the prompt" in seen
