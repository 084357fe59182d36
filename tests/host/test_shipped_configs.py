"""The overlays of the embedded model: what they say of each method, and that each of them runs."""

import pytest
from lods.methods import registry
from lods.models import cards

from tests.runs import ROOT, launch
from threestudio.utils.config import load_config

CONFIGS = ROOT / "configs"
BASES = {
    "lods-gs-embedding": "pocket",
    "lods-ngp-embedding": "pocket-ngp",
    "lods-mesh-embedding": "pocket-mesh",
}
CHAINS = [
    *([base, overlay] for base, overlay in BASES.items()),
    ["lods-gs-lora", "pocket", "pocket-lora"],
    ["lods-ngp-lora", "pocket-ngp", "pocket-lora"],
    ["lods-mesh-embedding", "mesh-lora", "pocket-mesh", "pocket-lora"],
    *(
        [base, overlay, f"{overlay}-{q}"]
        for base, overlay in BASES.items()
        for q in ("draft", "best")
    ),
]
SMALL = (
    "system.prompt_processor.prompt=a hamburger",
    "data.batch_size=1",
    "data.width=32",
    "data.height=32",
    "data.resolution_milestones=[]",
    "data.eval_width=16",
    "data.eval_height=16",
    "data.n_test_views=2",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "use_timestamp=false",
    "tag=t",
)


FOUR_VIEWS = ("lods-ngp-embedding", "mvdream-sd21")


def small(chain):
    """Overrides that make these configs a run of seconds."""
    more = SMALL if "ngp" in chain[0] else [w for w in SMALL if "milestones" not in w]
    balls = ["system.geometry.ball.n_points=60"] if "-gs-" in chain[0] else []
    if "mesh" in chain[0]:
        balls = ["system.geometry.ball.subdivisions=1", "system.geometry.texture_size=32"]
    rays = ["system.renderer.num_samples_per_ray=8"] if "ngp" in chain[0] else []
    return [*more, *balls, *rays]


@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
@pytest.mark.slow
def test_two_steps_of_each(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    files = [str(CONFIGS / f"{name}.yaml") for name in chain]
    assert launch(files, small(chain)) == 0


@pytest.mark.parametrize("name", sorted(registry.names()))
@pytest.mark.parametrize(("base", "overlay"), BASES.items())
def test_every_method_of_the_library_is_told_the_camera(name, base, overlay):
    files = [str(CONFIGS / f"{file}.yaml") for file in (base, overlay)]
    words = ["system.prompt_processor.prompt=x", f"system.guidance_type={name}-guidance"]
    assert load_config(*files, cli_args=words).system.guidance.cameras == "tokens"


@pytest.mark.parametrize("overlay", [chain[-1] for chain in CHAINS])
def test_schedules_end_within_the_steps(overlay):
    """Nothing that an overlay schedules lies after the last step of the chain it is made for."""
    [chain] = [c for c in CHAINS if c[-1] == overlay and ("lora" not in overlay or "gs" in c[0])]
    files = [str(CONFIGS / f"{file}.yaml") for file in chain]
    words = ["system.prompt_processor.prompt=x", "system.guidance_type=lods-bridge-guidance"]
    cfg = load_config(*files, cli_args=words)
    steps = cfg.trainer.max_steps
    assert cfg.system.guidance.bridge_start == steps / 2
    assert cfg.system.guidance.max_step_percent[3] == steps
    if "mesh" in chain[0]:
        assert cfg.system.lr_schedule["geometry.texture"][3] == steps
    if "strategy" in cfg.system:
        assert cfg.system.strategy.mcmc.refine_stop_iter < steps
        assert cfg.system.loss.lambda_opaque[3] < steps
        assert cfg.system.lr_schedule["geometry.means"][3] == steps
        assert cfg.system.strategy.mcmc.cap_max == cfg.system.geometry.ball.n_points


def test_every_overlay_that_ships_for_the_embedded_model_is_in_a_chain():
    overlay = cards.all_cards()[cards.EMBEDDED].overlay
    shipped = {file.stem for file in CONFIGS.glob(f"{overlay}*.yaml") if "shapes" not in file.stem}
    assert shipped == {n for chain in CHAINS for n in chain[1:] if n.startswith(overlay)}


@pytest.mark.parametrize(
    ("overlay", "method"),
    [
        *(("mvdream-sd21", method) for method in ("sds", "embedding", "lora")),
        ("mvadapter-sd21", "lora"),
    ],
)
@pytest.mark.slow
def test_two_steps_over_several_views(
    overlay, method, tmp_path, monkeypatch, tiny_multiview, tiny_adapted
):
    """With a tiny model in the place of the published one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    base = "lods-ngp-lora" if method == "lora" else "lods-ngp-embedding"
    files = [str(CONFIGS / f"{name}.yaml") for name in (base, overlay)]
    words = [w for w in small(FOUR_VIEWS) if "batch_size" not in w]
    folder, views = (tiny_multiview(), 4) if overlay == "mvdream-sd21" else (tiny_adapted(), 6)
    model = f"system.prompt_processor.pretrained_model_name_or_path={folder}"
    kind = f"system.guidance_type=lods-{method}-guidance"
    words += [f"data.batch_size={views}", "data.n_val_views=1", "trainer.precision=32", model, kind]
    words += ["system.prompt_processor.negative_prompt=a car"]
    assert launch(files, words) == 0


def test_four_views_are_distilled_as_published():
    """The settings of MVDream's configuration for Stable Diffusion 2.1."""
    files = [str(CONFIGS / f"{name}.yaml") for name in FOUR_VIEWS]
    cfg = load_config(*files, cli_args=["system.prompt_processor.prompt=x"])
    data, system = cfg.data, cfg.system
    assert (list(data.batch_size), data.n_view) == ([8, 4], 4)
    assert list(data.width) == list(data.height) == [64, 256]
    assert list(data.resolution_milestones) == [5000]
    assert list(data.camera_distance_range) == [0.8, 1.0]
    assert (list(data.fovy_range), list(data.elevation_range)) == ([15, 60], [0, 30])
    guidance = system.guidance
    assert (guidance.guidance_scale, guidance.recon_std_rescale) == (50.0, 0.5)
    assert list(guidance.min_step_percent) == [0, 0.98, 0.02, 8000]
    assert list(guidance.max_step_percent) == [0, 0.98, 0.5, 8000]
    assert (guidance.weighting_strategy, guidance.cameras) == ("latent", "tokens")
    assert cfg.trainer.max_steps == 10_000
    assert [system.loss[f"lambda_{k}"] for k in ("sds", "sparsity", "opaque", "orient")] == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]
