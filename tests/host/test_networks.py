"""Encodings and small networks against closed forms."""

import math

import numpy as np
import pytest
import torch
from lods.gaussians.harmonics import spherical_harmonics
from omegaconf import OmegaConf

from threestudio.models.networks import (
    ProgressiveBandFrequency,
    ProgressiveBandHashGrid,
    SphereInitVanillaMLP,
    ToDTypeWrapper,
    VanillaMLP,
    create_network_with_input_encoding,
    get_encoding,
    get_mlp,
)
from threestudio.models.spherical import real_spherical_harmonics
from threestudio.utils.errors import UserError

GRID = {
    "otype": "HashGrid",
    "n_levels": 3,
    "n_features_per_level": 2,
    "log2_hashmap_size": 8,
    "base_resolution": 4,
    "per_level_scale": 1.5,
}
MLP = {"otype": "VanillaMLP", "activation": "ReLU", "n_neurons": 8, "n_hidden_layers": 2}


def directions(n=50, seed=0):
    d = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 3)))
    return d / d.norm(dim=-1, keepdim=True)


def test_spherical_harmonics_are_those_of_scipy():
    from scipy.special import sph_harm_y

    d = directions()
    theta, phi = torch.acos(d[:, 2]).numpy(), torch.atan2(d[:, 1], d[:, 0]).numpy()
    ours = real_spherical_harmonics(d, 8).numpy()
    for k in range(8):
        for m in range(-k, k + 1):
            value = sph_harm_y(k, abs(m), theta, phi)  # with the Condon-Shortley sign (-1)^m
            real = value.real if m == 0 else math.sqrt(2) * (value.real if m > 0 else value.imag)
            np.testing.assert_allclose(ours[:, k * k + k + m], real, atol=1e-12)


def test_spherical_harmonics_are_those_of_the_gaussians(lods):
    d = directions()
    theirs = spherical_harmonics(d, 3)
    torch.testing.assert_close(real_spherical_harmonics(d, 4)[:, 1:], theirs)


def test_spherical_encoding_takes_directions_in_the_unit_cube():
    encoding = get_encoding(3, OmegaConf.create({"otype": "SphericalHarmonics", "degree": 3}))
    d = directions().float()
    assert encoding.n_output_dims == 9
    torch.testing.assert_close(encoding((d + 1) / 2), real_spherical_harmonics(d, 3))
    with pytest.raises(UserError, match="degree from 1 to 8"):
        get_encoding(3, {"otype": "SphericalHarmonics", "degree": 9})


def test_frequency_order():
    encoding = get_encoding(2, {"otype": "Frequency", "n_frequencies": 3})
    x = torch.rand(5, 2)
    out = encoding(x)
    assert out.shape == (5, 12) and encoding.n_output_dims == 12
    for axis in range(2):
        for k in range(3):
            angle = math.pi * 2**k * x[:, axis]
            column = 2 * (3 * axis + k)
            torch.testing.assert_close(out[:, column], angle.sin())
            torch.testing.assert_close(out[:, column + 1], angle.cos())


def test_bands_fade_in_one_after_the_other():
    encoding = ProgressiveBandFrequency(3, n_frequencies=4, n_masking_step=100)
    x = torch.rand(2, 3)
    assert not encoding(x).any()  # step 0: nothing
    encoding.update_step(0, 25)  # the first band is whole, the second has not begun
    assert encoding.mask.tolist() == [1.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(encoding(x)[:, :3], x.sin())
    torch.testing.assert_close(encoding(x)[:, 3:6], x.cos())
    encoding.update_step(0, 37.5)
    torch.testing.assert_close(encoding.mask, torch.tensor([1.0, 0.5, 0.0, 0.0]))
    encoding.update_step(0, 1000)
    assert encoding.mask.tolist() == [1.0] * 4
    assert ProgressiveBandFrequency(3, 4, 0).mask.tolist() == [1.0] * 4


def test_levels_come_one_after_the_other_whatever_the_order_of_updates():
    config = {k: v for k, v in GRID.items() if k != "otype"}
    grid = ProgressiveBandHashGrid(3, start_level=1, start_step=10, update_steps=5, **config)
    torch.nn.init.ones_(grid.encoding.params)
    x = torch.rand(4, 3)
    for step, levels in ((0, 1), (14, 1), (15, 2), (20, 3), (99, 3)):
        grid.update_step(0, step)
        expected = torch.tensor([1.0] * 2 * levels + [0.0] * 2 * (3 - levels))
        torch.testing.assert_close(grid(x), expected.expand(4, 6))


def test_xyz_stands_in_front():
    encoding = get_encoding(3, OmegaConf.create({**GRID, "include_xyz": True}))
    x = torch.rand(6, 3)
    out = encoding(x)
    assert encoding.n_output_dims == out.shape[1] == 9
    torch.testing.assert_close(out[:, :3], 2 * x - 1)
    torch.testing.assert_close(out[:, 3:], encoding.encoding(x))


def test_parameter_names_are_upstreams():
    network = create_network_with_input_encoding(3, 1, GRID, MLP)
    names = list(network.state_dict())
    assert names[0] == "encoding.encoding.encoding.params"
    assert names[1:] == [f"network.layers.{i}.weight" for i in (0, 2, 4)]
    assert network(torch.rand(5, 3)).shape == (5, 1)


def test_vanilla_mlp_is_a_chain_of_matrices():
    mlp = get_mlp(3, 2, {**MLP, "output_activation": "sigmoid"})
    x = torch.randn(7, 3)
    a, b, c = (mlp.layers[i].weight for i in (0, 2, 4))
    torch.testing.assert_close(mlp(x), torch.sigmoid(((x @ a.T).relu() @ b.T).relu() @ c.T))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("inside_out", [False, True])
def test_sphere_init_is_a_signed_distance(inside_out):
    torch.manual_seed(0)
    config = {
        "otype": "SphereInitVanillaMLP",
        "n_neurons": 256,
        "n_hidden_layers": 3,
        "sphere_init_radius": 0.5,
        "inside_out": inside_out,
    }
    mlp = get_mlp(3, 1, config)
    assert isinstance(mlp, SphereInitVanillaMLP)
    d = directions(500).float()
    sign = -1.0 if inside_out else 1.0
    inside, wall, outside = (sign * mlp(r * d).mean().item() for r in (0.2, 0.5, 0.9))
    # of random networks, and rounded off near the centre by the softplus: right within the noise
    assert inside < -0.1 and abs(wall) < 0.15
    assert abs((outside - wall) / 0.4 - 1) < 0.2  # the slope of a distance


def test_fused_networks_fall_back_to_a_vanilla_one():
    assert isinstance(get_mlp(3, 1, {**MLP, "otype": "FullyFusedMLP"}), VanillaMLP)


def test_mistakes_are_named():
    for build, message in (
        (lambda: get_encoding(3, {"otype": "HashGird"}), "did you mean 'HashGrid'"),
        (lambda: get_encoding(3, {**GRID, "n_level": 3}), "did you mean 'n_levels'"),
        (lambda: get_mlp(3, 1, {"otype": "VanilaMLP"}), "did you mean 'VanillaMLP'"),
        (lambda: get_mlp(3, 1, {**MLP, "n_neuron": 3}), "did you mean 'n_neurons'"),
        (lambda: get_mlp(3, 1, {"otype": "VanillaMLP", "n_neurons": 3}), "n_hidden_layers"),
        (lambda: get_mlp(3, 1, {**MLP, "activation": "Sine"}), "activation is ReLU here"),
        # the stand-in for a fused network must not compute something else than was asked for
        (
            lambda: get_mlp(3, 1, {**MLP, "otype": "FullyFusedMLP", "activation": "Sine"}),
            "activation is ReLU here",
        ),
    ):
        with pytest.raises(UserError, match=message):
            build()


def test_wrapper_casts():
    assert ToDTypeWrapper(torch.nn.Linear(2, 2), torch.float64)(torch.ones(1, 2)).dtype is (
        torch.float64
    )


def test_a_tinycudann_that_does_not_load_has_a_substitute(monkeypatch):
    """As for the hash grid: built for another card, it raises OSError."""
    said = []
    monkeypatch.setattr("threestudio.info", said.append)
    monkeypatch.setattr("threestudio.models.hashgrid.native.missing", lambda: "does not load")
    config = {"otype": "FullyFusedMLP", "n_neurons": 4, "n_hidden_layers": 1}
    assert type(get_mlp(3, 2, config)).__name__ == "VanillaMLP"
    assert said == ["network FullyFusedMLP: VanillaMLP in its place (does not load)"]
    warnings = []
    monkeypatch.setattr("threestudio.warn", warnings.append)
    monkeypatch.setattr("threestudio.models.networks.get_device", lambda: torch.device("cuda", 0))
    get_mlp(3, 2, config)
    assert warnings == said[:1] and len(said) == 1, "on a GPU run it is a warning"
    with pytest.raises(UserError, match="sphere_init_radius is missing"):
        get_mlp(3, 2, config | {"otype": "SphereInitVanillaMLP"})
