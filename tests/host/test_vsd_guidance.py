"""``stable-diffusion-vsd-guidance`` against its formula, with tiny random models."""

import pytest
import torch

import threestudio
from tests.host.test_stable_diffusion_guidance import images
from threestudio.utils.errors import UserError

SAME = "pretrained_model_name_or_path_lora"


class Prompt:
    """Prompt, then negative prompt; of the view, and plain."""

    use_perp_neg = False

    def __init__(self, width=32, tokens=16):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(2, 2, tokens, width, generator=generator)

    def get_text_embeddings(self, elevation, azimuth, distances, view_dependent_prompting=True):
        c, u = self.rows[0 if view_dependent_prompting else 1]
        n = len(elevation)
        return torch.cat([c.expand(n, -1, -1), u.expand(n, -1, -1)])


def views(n=2):
    zero = torch.zeros(n)
    generator = torch.Generator().manual_seed(1)
    return {
        "elevation": zero,
        "azimuth": zero,
        "camera_distances": zero + 1,
        "c2w": torch.randn(n, 4, 4, generator=generator),
        "mvp_mtx": torch.randn(n, 4, 4, generator=generator),
    }


@pytest.fixture
def make(tiny_sd):
    def build(kind="epsilon", lora=None, **cfg):
        model = tiny_sd(prediction_type=kind)
        other = tiny_sd(prediction_type=lora, seed=3) if lora else model
        torch.manual_seed(0)
        return threestudio.find("stable-diffusion-vsd-guidance")(
            {"pretrained_model_name_or_path": model, SAME: other, **cfg}
        )

    return build


def shake(guidance):
    """Let what is learnt be something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in guidance.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def untouched(tiny_sd, kind, seed=0):
    cfg = {"pretrained_model_name_or_path": tiny_sd(prediction_type=kind, seed=seed)}
    return threestudio.find("stable-diffusion-guidance")(cfg)


def gradient(guidance, seed=7, **more):
    x = torch.randn(2, 8, 8, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(seed)
    out = guidance(x, Prompt(), **views(), rgb_as_latents=True, **more)
    (grad,) = torch.autograd.grad(out["loss_vsd"], x)
    return 2 * grad.permute(0, 3, 1, 2), x.detach().permute(0, 3, 1, 2), out


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("lora", [None, "v_prediction"])
def test_the_gradient_is_the_formula(make, tiny_sd, kind, lora):
    """The frozen model is one that no LoRA was put into; the learnt one is given its camera."""
    guidance = make(kind, lora, guidance_scale=3.0, guidance_scale_lora=2.0)
    shake(guidance)
    got, z, out = gradient(guidance)

    torch.manual_seed(7)
    t = torch.randint(out["min_step"], out["max_step"] + 1, (2,))
    eps = torch.randn_like(z)
    frozen = untouched(tiny_sd, kind)
    abar = frozen.alphas[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
    (c, u), (pc, pu) = Prompt().rows

    def of_frozen(text):
        return frozen.predict_noise(x_t, t, text.expand(2, -1, -1))

    def of_learnt(text, camera):
        with torch.no_grad():
            output = guidance._learnt_output(x_t, t, text.expand(2, -1, -1), camera)
        if (lora or kind) == "v_prediction":
            return abar.sqrt() * output + (1 - abar).sqrt() * x_t
        return output

    camera = views()["c2w"].flatten(1)
    with torch.no_grad():
        target = of_frozen(u) + 3.0 * (of_frozen(c) - of_frozen(u))
    no_camera = of_learnt(pu, torch.zeros(2, 16))
    learnt = no_camera + 2.0 * (of_learnt(pc, camera) - no_camera)
    torch.testing.assert_close(got, (1 - abar) * (target - learnt), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["grad_norm"], got.norm(), rtol=1e-4, atol=1e-5)


def test_the_learnt_model_starts_as_the_model_but_for_its_camera(make, tiny_sd):
    guidance = make()
    for name, parameter in guidance.camera_embedding.named_parameters():
        if name.startswith("linear_2"):
            parameter.data.zero_()
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([300]), Prompt().rows[0, :1]
    with torch.no_grad():
        got = guidance._learnt_output(x, t, text, torch.ones(1, 16))
        torch.testing.assert_close(got, untouched(tiny_sd, "epsilon").forward_unet(x, t, text))


@pytest.mark.parametrize("lora", [None, "v_prediction"])
def test_the_loss_of_the_lora_is_the_models_own(make, lora):
    guidance = make("epsilon", lora, lora_n_timestamp_samples=2, lora_cfg_training=False)
    shake(guidance)
    z, camera = torch.randn(2, 4, 8, 8), views()["c2w"].flatten(1)
    text = Prompt().get_text_embeddings(*[torch.zeros(2)] * 3, False)
    torch.manual_seed(4)
    got = guidance.train_lora(z, text, camera)
    torch.manual_seed(4)
    t = torch.randint(1000, (4,))
    noise, twice = torch.randn(4, 4, 8, 8), z.repeat(2, 1, 1, 1)
    alpha, sigma = guidance.prior_lora._alpha_sigma(t)
    c = text[:2].repeat(2, 1, 1)
    output = guidance._learnt_output(alpha * twice + sigma * noise, t, c, camera.repeat(2, 1))
    target = alpha * noise - sigma * twice if lora else noise
    torch.testing.assert_close(got, (output - target).square().mean())
    got.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in guidance.parameters())


def test_a_tenth_of_the_steps_learns_without_a_camera(make, monkeypatch):
    guidance, seen = make(), []
    output = guidance._learnt_output

    def watch(x_t, t, text, camera):
        seen.append(camera.abs().sum().item() == 0)
        return output(x_t, t, text, camera)

    monkeypatch.setattr(guidance, "_learnt_output", watch)
    text = Prompt().get_text_embeddings(*[torch.zeros(1)] * 3, False)
    torch.manual_seed(0)
    for _ in range(100):
        guidance.train_lora(torch.zeros(1, 4, 8, 8), text, torch.ones(1, 16))
    assert 3 <= sum(seen) <= 20


def test_only_lora_and_camera_are_trained_and_saved(make):
    guidance = make()
    names = {name.split(".")[0] for name, _ in guidance.named_parameters()}
    assert names == {name.split(".")[0] for name in guidance.state_dict()}
    assert names == {"lora_layers", "camera_embedding"}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in guidance.parameters())
    gradient(guidance)  # which switches the LoRA off and on
    assert all(p.requires_grad for p in guidance.parameters())
    other = make()
    shake(guidance)
    other.load_state_dict(guidance.state_dict())
    torch.testing.assert_close(gradient(other)[0], gradient(guidance)[0])


def test_the_camera_may_be_the_projection(make):
    guidance = make(camera_condition_type="mvp")
    shake(guidance)
    before = gradient(guidance)[0]
    x = torch.randn(2, 8, 8, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for key, same in (("c2w", True), ("mvp_mtx", False)):
        batch = views()
        batch[key] = batch[key] + 1
        torch.manual_seed(7)
        out = guidance(x, Prompt(), **batch, rgb_as_latents=True)
        (grad,) = torch.autograd.grad(out["loss_vsd"], x)
        assert torch.equal(2 * grad.permute(0, 3, 1, 2), before) == same


def test_images_schedules_and_the_clip(make):
    guidance = make(grad_clip=1e-3, max_step_percent=schedule([5, 0.98, 0.5, 6]))
    guidance.update_step(0, 7)
    x = images().requires_grad_()
    out = guidance(x, Prompt(), **views())
    assert (out["min_step"], out["max_step"]) == (20, 500)
    assert out["grad_norm"] <= 1e-3 * (2 * 4 * 8 * 8) ** 0.5 * (1 + 1e-5)
    out["loss_vsd"].backward()
    assert x.grad.abs().sum() > 0


def schedule(values):
    from omegaconf import OmegaConf

    return OmegaConf.create(values)


def test_what_the_models_draw(make):
    guidance = make(lora="v_prediction")
    for draw in (guidance.sample, guidance.sample_lora):
        state = torch.get_rng_state()
        pictures = draw(Prompt(), **views(), seed=3)
        assert pictures.shape == (2, 16, 16, 3) and 0 <= pictures.min() <= pictures.max() <= 1
        assert torch.equal(draw(Prompt(), **views(), seed=3), pictures)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("camera_condition_type", "extrinsic", "did you mean 'extrinsics'"),
        ("lora_n_timestamp_samples", 0, "from 1 to 1024"),
        ("enable_sequential_cpu_offload", True, "does not go with a LoRA"),
        ("min_step_percent", 0.99, "min_step_percent <= max_step_percent"),
    ],
)
def test_bad_fields_are_one_line(make, field, value, text):
    with pytest.raises(UserError, match=text):
        make(**{field: value})


def test_another_text_width_is_refused(make):
    with pytest.raises(UserError, match="have width 24"):
        make()(torch.rand(2, 16, 16, 3), Prompt(width=24), **views())
