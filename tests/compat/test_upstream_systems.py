"""Configurations as upstream's users write them, with the systems that upstream has: two steps each
through ``launch.py``, and their losses by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import threestudio
from tests.runs import launch, read
from threestudio.systems.guided import GuidedSystem
from threestudio.utils.errors import UserError

SCENE = """
name: {name}
tag: t
use_timestamp: false
seed: 0
data_type: random-camera-datamodule
data:
  batch_size: 1
  width: 12
  height: 12
  eval_width: 12
  eval_height: 12
  n_test_views: 2
system_type: {system}
system:
  geometry_type: implicit-volume
  geometry:
    radius: 1.0
    normal_type: finite_difference
    density_bias: blob_magic3d
    density_blob_scale: 10.
    n_feature_dims: {channels}
    pos_encoding_config:
      otype: HashGrid
      n_levels: 2
      n_features_per_level: 2
      log2_hashmap_size: 8
      base_resolution: 4
      per_level_scale: 1.4472692374403782
  material_type: no-material
  material:
    n_output_dims: {channels}
    color_activation: {activation}
    requires_normal: true
  background_type: solid-color-background
  background:
    n_output_dims: {channels}
    color: {color}
  renderer_type: nerf-volume-renderer
  renderer:
    radius: ${{system.geometry.radius}}
    num_samples_per_ray: 16
  prompt_processor_type: stable-diffusion-prompt-processor
  prompt_processor:
    pretrained_model_name_or_path: {model}
    prompt: a red car
  guidance_type: {guidance}
  guidance:
    pretrained_model_name_or_path: {model}
    guidance_scale: 7.5
    max_step_percent: 0.98
  loss:
    lambda_sds: 1.
    lambda_vsd: 1.
    lambda_lora: 1.
    lambda_orient: [0, 10., 1000., 5000]
    lambda_sparsity: 1.
    lambda_opaque: 0.
    lambda_z_variance: 1.
  optimizer:
    name: Adam
    args: {{betas: [0.9, 0.99], eps: 1.e-15}}
    params:
      geometry: {{lr: 0.01}}
trainer:
  max_steps: 2
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  val_check_interval: 2
  enable_progress_bar: false
  precision: 32
checkpoint:
  save_last: true
  save_top_k: -1
  every_n_train_steps: ${{trainer.max_steps}}
"""


@pytest.fixture
def go(tmp_path, monkeypatch, tiny_sd):
    """``go(system, *overrides, mode=, **fields) -> (exit status, folder of the run)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(system, *overrides, mode="--train", guidance="stable-diffusion-guidance", latent=False):
        text = SCENE.format(
            name=system,
            system=system,
            guidance=guidance,
            model=tiny_sd(),
            channels=4 if latent else 3,
            activation="none" if latent else "sigmoid",
            color="[0., 0., 0., 0.]" if latent else "[1., 1., 1.]",
        )
        Path("scene.yaml").write_text(text)
        return launch(["scene.yaml"], overrides, mode), Path("outputs", system, "t")

    return run


def has_trained(folder, *parts):
    """Whether the run has moved the geometry, and has its pictures and its video."""
    state = read(folder / "ckpts" / "last.ckpt")["state_dict"]
    assert (folder / "save" / "it2-0.png").is_file()
    assert (folder / "save" / "it2-test.mp4").stat().st_size > 0
    sizes = {Image.open(p).size for p in (folder / "save" / "it2-test").glob("*.png")}
    assert len(sizes) == 1
    roots = {key.split(".")[0] for key in state}
    assert {"geometry", *parts} <= roots
    return state, sizes.pop()


def metrics(folder):
    (file,) = (folder / "csv_logs").rglob("metrics.csv")
    return file.read_text().splitlines()[0].split(",")


@pytest.mark.slow
def test_dreamfusion(go):
    status, folder = go("dreamfusion-system")
    assert status == 0
    state, size = has_trained(folder)
    assert size == (36, 12)  # colours, normals, opacity
    assert not [key for key in state if "guidance" in key]
    logged = set(metrics(folder))
    for name in ("sds", "orient", "sparsity", "opaque", "z_variance"):
        assert f"train/loss_{name}" in logged and f"train_params/lambda_{name}" in logged
    assert "train/grad_norm" in logged
    # neither the model nor the prompt is loaded for a test
    gone = "system.guidance.pretrained_model_name_or_path=/nowhere"
    more = [f"resume={folder}/ckpts/last.ckpt", gone]
    assert go("dreamfusion-system", *more, mode="--test")[0] == 0


@pytest.mark.slow
def test_prolificdreamer(go, tiny_sd):
    vsd = [
        f"system.guidance.pretrained_model_name_or_path_lora={tiny_sd()}",
        "system.optimizer.params={geometry: {lr: 0.01}, guidance: {lr: 0.01}}",
        "system.visualize_samples=true",
    ]
    status, folder = go("prolificdreamer-system", *vsd, guidance="stable-diffusion-vsd-guidance")
    assert status == 0
    state, _ = has_trained(folder, "guidance")
    learned = [v for k, v in state.items() if k.startswith("guidance.lora_layers")]
    assert learned and sum(bool(v.any()) for v in learned) == len(learned)  # B started as zero
    assert Image.open(folder / "save" / "it2-0-sample.png").size == (32, 16)
    assert {"train/loss_vsd", "train/loss_lora"} <= set(metrics(folder))
    # and a resumed run finds what was learned
    more = [*vsd, f"resume={folder}/ckpts/last.ckpt", "trainer.max_steps=3"]
    assert go("prolificdreamer-system", *more, guidance="stable-diffusion-vsd-guidance")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("refinement", [False, True])
def test_latentnerf(go, refinement, tmp_path):
    import trimesh

    shape = tmp_path / "ball.obj"
    trimesh.creation.icosphere(1).export(shape)
    more = [f"system.guide_shape={shape}", "system.loss.lambda_shape=0.1"]
    more += [f"system.refinement={str(refinement).lower()}"]
    status, folder = go("latentnerf-system", *more, latent=not refinement)
    assert status == 0
    _, (width, height) = has_trained(folder)
    # latents of 12 x 12 are decoded to 24 x 24, and the other panels are as large
    assert (width, height) == ((36, 12) if refinement else (72, 24))
    assert "train/loss_shape" in metrics(folder)
    if not refinement:
        again = [*more, f"resume={folder}/ckpts/last.ckpt"]
        assert go("latentnerf-system", *again, mode="--test", latent=True)[0] == 0


@pytest.mark.parametrize(
    "system, overrides, text",
    [
        pytest.param(
            "dreamfusion-system",
            ["system.guidance.use_img_loss=true"],
            "add system.loss.lambda_sds_img",
            marks=pytest.mark.slow,
        ),
        ("prolificdreamer-system", ["system.stage=texure"], "did you mean 'texture'"),
        ("prolificdreamer-system", ["system.stage=geometry"], "return_comp_normal=true"),
        pytest.param(
            "prolificdreamer-system",
            ["system.stage=geometry", "system.renderer.return_comp_normal=true"],
            "needs a renderer of meshes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "dreamfusion-system",
            ["system.material.requires_normal=false"],
            "lambda_orient needs",
            marks=pytest.mark.slow,
        ),
        ("latentnerf-system", ["system.guide_shape=/nowhere.obj"], "/nowhere.obj cannot be read"),
    ],
)
def test_mistakes_are_one_line(go, capsys, system, overrides, text):
    assert go(system, *overrides)[0] == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and text in lines[0]


# --- the losses by hand ---


def losses(out, **weights):
    """``field_losses`` of a system with these lambdas."""
    loss = OmegaConf.create({f"lambda_{k}": v for k, v in weights.items()})
    fake = SimpleNamespace(cfg=SimpleNamespace(loss=loss), C=float)
    fake.weight_of = lambda name: GuidedSystem.weight_of(fake, name)
    return GuidedSystem.field_losses(fake, out)


def test_field_losses_are_their_formulas():
    opacity = torch.tensor([0.0, 0.2, 0.8, 1.0]).view(1, 2, 2, 1)
    out = {
        "opacity": opacity,
        "z_variance": torch.tensor([9.0, 9.0, 1.0, 3.0]).view(1, 2, 2, 1),
        "normal": torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]),
        "t_dirs": torch.tensor([[0.0, 0.6, 0.8], [-1.0, 0.0, 0.0]]),
        "weights": torch.tensor([[0.5], [0.5]], requires_grad=True),
    }
    got = losses(out, orient=1.0, sparsity=1.0, opaque=1.0, z_variance=1.0)
    assert got["orient"].item() == pytest.approx(0.5 * 0.8**2 / 3)
    assert not got["orient"].requires_grad
    o = np.array([0.0, 0.2, 0.8, 1.0])
    assert got["sparsity"].item() == pytest.approx(np.sqrt(o**2 + 0.01).mean())
    o = o.clip(1e-3, 1 - 1e-3)
    entropy = -(o * np.log(o) + (1 - o) * np.log(1 - o)).mean()
    assert got["opaque"].item() == pytest.approx(entropy, rel=1e-4)
    assert got["z_variance"].item() == 2.0
    empty = {**out, "opacity": torch.zeros_like(opacity)}
    assert losses(empty, z_variance=1.0)["z_variance"].item() == 0
    assert losses(out, orient=0.0) == {}


def test_the_total_weighs_what_the_guidance_gives():
    logged = {}
    loss = OmegaConf.create({"lambda_sds": 2.0, "lambda_sparsity": 3.0})
    fake = SimpleNamespace(
        cfg=SimpleNamespace(loss=loss),
        C=float,
        log=lambda name, value: logged.update({name: value}),
    )
    fake.weight_of = lambda name: GuidedSystem.weight_of(fake, name)
    guided = {"loss_sds": torch.tensor(5.0), "grad_norm": torch.tensor(7.0), "eval": {}}
    total = GuidedSystem.total(fake, guided, {"sparsity": torch.tensor(1.0)})
    assert total["loss"] == 13
    assert logged == {
        "train/loss_sds": 5.0,
        "train/grad_norm": 7.0,
        "train/loss_sparsity": 1.0,
        "train_params/lambda_sds": 2.0,
        "train_params/lambda_sparsity": 3.0,
    }
    with pytest.raises(UserError, match=r"add system\.loss\.lambda_lora"):
        GuidedSystem.total(fake, {"loss_lora": torch.tensor(1.0)}, {})
    assert issubclass(threestudio.find("dreamfusion-system"), GuidedSystem)
