"""The radiance-field system through the command line and the trainer, with a tiny random model."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from omegaconf import OmegaConf
from PIL import Image

from tests.runs import LEARNING, ROOT, SMALL_FIELD, fit, launch, small_run, switch, two_and_two

CONFIGS = {
    "embedding": ["lods-ngp-embedding.yaml"],
    "lora": ["lods-ngp-lora.yaml"],
    "embedding+pocket": ["lods-ngp-embedding.yaml", "pocket-shapes-ngp.yaml"],
    "lora+pocket": ["lods-ngp-lora.yaml", "pocket-shapes-ngp.yaml"],
}
KEYS = ("state_dict", "optimizer_states", "rng_state", "global_step")


@pytest.fixture
def small(tiny_sd, tmp_path, monkeypatch):
    """``small(config, *overrides) -> (files, overrides)`` of a run of seconds, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def make(config, *more):
        return [str(ROOT / "configs" / name) for name in CONFIGS[config]], [
            *small_run(tiny_sd()),
            *SMALL_FIELD,
            "system.geometry.isosurface_resolution=24",
            "system.exporter.texture_size=32",
            *more,
        ]

    return make


def trial(config):
    return Path("outputs") / CONFIGS[config][0].removesuffix(".yaml") / "t"


@pytest.mark.parametrize("guidance", ["embedding", "lora", "sds", "vsd"])
def test_four_steps_are_two_and_two(small, guidance):
    """A checkpoint of step 2, written by a callback inside of the loop, continues to the same
    step 4: parameters, occupancy grid, optimizer and random numbers."""
    config = "lora+pocket" if guidance == "lora" else "embedding+pocket"
    run = small(config, *switch(guidance))
    start, whole = two_and_two(run, KEYS)
    assert {"geometry.encoding.encoding.encoding.params", "renderer.estimator.occs"} <= set(
        whole["state_dict"]
    )
    moved = [
        key
        for key, value in whole["state_dict"].items()
        if not torch.equal(value, start["state_dict"][key])
    ]
    assert "geometry.encoding.encoding.encoding.params" in moved
    assert any(key.startswith("guidance.") for key in moved) == (guidance in LEARNING)


@pytest.mark.parametrize("prior", ["csd", "nfsd", "bridge", "sdi", "ism"])
def test_every_method_trains(small, prior):
    system, trainer = fit(*small("embedding+pocket", *switch(prior)))
    assert trainer.global_step == 2 and system.guidance.now == 1
    assert system.loss_terms["loss_sds"] > 0
    state = trainer.optimizers[0].state
    assert all(state[p]["exp_avg"].any() for p in system.geometry.density_network.parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_shipped_configurations_run(small, config, capsys):
    assert launch(*small(config)) == 0
    save = trial(config) / "save"
    with Image.open(save / "it2-test-sheet.png") as sheet:
        assert sheet.size == (4 * 24, 2 * 24)  # five views, none of which comes twice
    with Image.open(save / "it2-0.png") as grid:  # rgb, opacity
        assert grid.size == (2 * 24, 24)
    printed = capsys.readouterr().out
    mesh = save / "it2-export" / ("model.glb" if "pocket" in config else "model.obj")
    for what, path in {"video": save / "it2-test.mp4", "mesh": mesh}.items():
        assert f"{what}: {path}" in printed
    loaded = trimesh.load(mesh, force="mesh")
    # the blob: softplus(10 (1 - r / 0.5)) = 3 at r = 0.5 (1 - ln(e^3 - 1) / 10) = 0.353
    loaded.merge_vertices(merge_tex=True, merge_norm=True)  # seams of the texture
    assert loaded.is_watertight
    np.testing.assert_allclose(np.abs(loaded.bounds), 0.353, atol=0.02)


def test_a_mesh_without_a_surface_does_not_spoil_a_run(small, capsys):
    assert launch(*small("embedding+pocket", "system.geometry.isosurface_threshold=1000")) == 0
    folder = trial("embedding")
    assert (folder / "save" / "it2-export" / "prior.safetensors").exists()
    resume = f"resume={folder}/ckpts/last.ckpt"
    assert launch([str(folder / "configs" / "parsed.yaml")], [resume], "--export") != 0
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("error:"))
    assert "isosurface_threshold" in line and "Traceback" not in error


def test_test_and_export_reproduce(small):
    run = small("lora+pocket", "trainer.max_steps=3", "system.exporter.fmt=glb")
    assert launch(*run) == 0
    folder = trial("lora")
    files = ["it3-test-sheet.png", "it3-test/3.png", "it3-export/model.glb"]
    before = {name: (folder / "save" / name).read_bytes() for name in files}
    resume = f"resume={folder}/ckpts/last.ckpt"
    for mode, written in (("--test", files), ("--export", files[2:])):
        for name in files:
            (folder / "save" / name).unlink()
        assert launch([str(folder / "configs" / "parsed.yaml")], [resume], mode) == 0
        for name in files:
            path = folder / "save" / name
            if name in written:
                assert path.read_bytes() == before[name], (mode, name)
            path.write_bytes(before[name])


def test_losses_are_their_formulas(small):
    weights = ["orient", "z_variance"]
    more = [f"system.loss.lambda_{name}=1.0" for name in weights]
    normals = ["system.geometry.normal_type=analytic", "system.material.requires_normal=true"]
    system, _ = fit(*small("embedding+pocket", *more, *normals))
    opacity = torch.tensor([0.0, 0.4, 0.9, 1.0]).view(1, 2, 2, 1)
    out = {
        "opacity": opacity,
        "z_variance": torch.tensor([5.0, 7.0, 1.0, 2.0]).view(1, 2, 2, 1),
        "normal": torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]),
        "t_dirs": torch.tensor([[0.0, 0.6, 0.8], [0.0, 0.6, 0.8]]),
        "weights": torch.tensor([[0.5], [0.25]], requires_grad=True),
    }
    losses = system.regularisers(out)
    assert losses["z_variance"].item() == 1.5  # the two rays above 1/2
    assert losses["orient"].item() == pytest.approx(0.5 * 0.8**2 / 3)  # three rays meet something
    assert not losses["orient"].requires_grad
    out["opacity"] = torch.zeros(1, 2, 2, 1)
    losses = system.regularisers(out)
    assert losses["z_variance"] == 0 and torch.isfinite(losses["orient"])
    del out["normal"]
    with pytest.raises(ValueError, match="lambda_orient needs normals"):
        system.regularisers(out)
    system.cfg.loss.lambda_orient = [0, 0.0, 0.0, 1]  # scheduled, and never above 0
    assert "orient" not in system.regularisers(out)


def test_the_guidance_looks_at_normals_in_the_geometry_stage(small):
    normals = [
        "system.geometry.normal_type=finite_difference",
        "system.material.requires_normal=true",
        "system.renderer.return_comp_normal=true",
    ]
    stage = "system.stage=geometry"
    system, _ = fit(*small("embedding+pocket", stage, *normals))
    assert system.guided_image({"comp_normal": 1, "comp_rgb": 2}) == 1
    with pytest.raises(ValueError, match="stage=geometry needs normals"):
        fit(*small("embedding+pocket", stage))
    with pytest.raises(ValueError, match="stage must be one of coarse, geometry, texture"):
        fit(*small("embedding+pocket", "system.stage=fine"))


def test_lora_configuration_differs_in_the_prior_only():
    one, two = (
        OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / f"lods-ngp-{name}.yaml"))
        for name in ("embedding", "lora")
    )
    one["name"] = two["name"]
    one["system"]["guidance_type"] = two["system"]["guidance_type"]
    one["system"]["prompt_processor"]["negative_prompt"] = "<new1>"
    one["system"]["optimizer"]["params"]["guidance"]["lr"] = 5e-7
    assert one == two
