"""Implicit volumes, volume grids, the materials and the backgrounds of radiance fields."""

import math

import pytest
import torch

import threestudio
from threestudio.utils.errors import UserError

GRID = {
    "otype": "HashGrid",
    "n_levels": 2,
    "log2_hashmap_size": 10,
    "base_resolution": 4,
    "per_level_scale": 1.5,
}


def volume(**config):
    torch.manual_seed(0)
    return threestudio.find("implicit-volume")({"pos_encoding_config": GRID, **config})


def silence(geometry):
    """Make the network's part of the density zero: what is left is known."""
    for parameter in geometry.density_network.parameters():
        torch.nn.init.zeros_(parameter)
    return geometry


def points(n=40, radius=0.8):
    torch.manual_seed(1)
    return (torch.rand(n, 3) * 2 - 1) * radius


def test_blobs():
    x = points()
    r = x.norm(dim=-1, keepdim=True)
    options = {"density_blob_scale": 7.0, "density_blob_std": 0.4, "density_activation": "none"}
    for bias, expected in (
        ("blob_magic3d", 7 * (1 - r / 0.4)),
        ("blob_dreamfusion", 7 * torch.exp(-(r**2) / (2 * 0.4**2))),
        (-2, torch.full_like(r, -2.0)),
    ):
        geometry = silence(volume(density_bias=bias, radius=2.0, **options))
        torch.testing.assert_close(geometry.forward_density(x), expected)
    softplus = silence(volume(density_blob_scale=7.0))(x)["density"]
    torch.testing.assert_close(softplus, torch.nn.functional.softplus(7 * (1 - r / 0.5)))


@pytest.mark.parametrize("kind", ["finite_difference", "finite_difference_laplacian", "analytic"])
def test_normals_of_a_blob_point_outward(kind):
    geometry = silence(volume(normal_type=kind, finite_difference_normal_eps=1e-3))
    x = points()
    outward = torch.nn.functional.normalize(x, dim=-1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = geometry(x, output_normal=True)
        torch.testing.assert_close(out["normal"], outward, atol=2e-2, rtol=0)
        assert out["shading_normal"] is out["normal"]
        assert out["normal"].requires_grad == grad
    with torch.inference_mode():
        torch.testing.assert_close(
            geometry(x, output_normal=True)["normal"], outward, atol=2e-2, rtol=0
        )


def test_analytic_normals_train_the_encoding():
    geometry = volume(normal_type="analytic")
    geometry(points(), output_normal=True)["normal"][:, 0].sum().backward()
    assert geometry.encoding.encoding.encoding.params.grad.abs().max() > 0


def test_predicted_normals_are_unit_vectors():
    out = volume(normal_type="pred")(points(), output_normal=True)
    torch.testing.assert_close(out["normal"].norm(dim=-1), torch.ones(40))


def test_taps_stay_within_the_radius():
    """At the wall the outside tap is the wall itself: the difference across it is zero."""
    geometry = silence(volume())
    seen = []
    original = geometry.forward_density
    geometry.forward_density = lambda x: seen.append(x) or original(x)
    geometry(torch.tensor([[1.0, 0.2, -1.0]]), output_normal=True)
    assert seen[0].abs().max() == 1.0


def test_shapes_keys_and_export():
    geometry = volume(n_feature_dims=5, normal_type=None)
    assert sorted(geometry.state_dict()) == [
        "bbox",
        "density_network.layers.0.weight",
        "density_network.layers.2.weight",
        "encoding.encoding.encoding.params",
        "feature_network.layers.0.weight",
        "feature_network.layers.2.weight",
    ]
    out = geometry(points().reshape(5, 8, 3))
    assert out["density"].shape == (5, 8, 1) and out["features"].shape == (5, 8, 5)
    assert set(out) == {"density", "features"}
    exported = geometry.export(points().reshape(5, 8, 3))
    torch.testing.assert_close(exported["features"], out["features"])
    field, deformation = geometry.forward_field(points())
    assert deformation is None
    torch.testing.assert_close(geometry.forward_level(field, 3.0), 3.0 - field)
    with pytest.raises(UserError, match="normal_type is null"):
        geometry(points(), output_normal=True)
    assert volume(n_feature_dims=0).export(points()) == {}


def test_a_volume_made_from_another_is_the_same():
    one = volume()
    torch.nn.init.normal_(one.encoding.encoding.encoding.params)
    two = type(one).create_from(one, one.cfg)
    torch.testing.assert_close(two(points())["features"], one(points())["features"])
    three = type(one).create_from(one, one.cfg, copy_net=False)
    torch.testing.assert_close(three.forward_density(points()), one.forward_density(points()))
    assert not torch.allclose(three(points())["features"], one(points())["features"])
    with pytest.raises(TypeError, match="VolumeGrid"):
        type(one).create_from(threestudio.find("volume-grid")({"grid_size": [2, 2, 2]}), one.cfg)


def test_blob_anneals():
    schedule = {"min_anneal_step": 10, "max_anneal_step": 20, "start_val": 0.5, "end_val": 0.1}
    geometry = silence(volume(anneal_density_blob_std_config=schedule, density_activation="none"))
    x = torch.tensor([[0.3, 0.0, 0.0]])
    for step, std in ((0, 0.5), (15, 0.3), (30, 0.1)):
        geometry.update_step(0, step)
        assert math.isclose(geometry.forward_density(x).item(), 10 * (1 - 0.3 / std), rel_tol=1e-5)


def test_mistakes_are_named():
    for config, message in (
        ({"density_bias": "blob_magic"}, "did you mean 'blob_magic3d'"),
        ({"normal_type": "analytical"}, "finite_difference.*null, not"),
    ):
        with pytest.raises(UserError, match=message):
            volume(**config)


def test_volume_grid_interpolates():
    geometry = threestudio.find("volume-grid")(
        {"grid_size": [4, 5, 6], "density_bias": 0.5, "density_activation": "none", "radius": 2.0}
    )
    # values linear in the position: interpolation is exact between the outermost cell centres
    axes = [torch.arange(n) for n in (4, 5, 6)]
    z, y, x = torch.meshgrid(*[(2 * a + 1) / len(a) - 1 for a in axes], indexing="ij")
    with torch.no_grad():
        geometry.grid.copy_(torch.stack([x + 2 * y - z, x, y, z])[None])
        geometry.density_scale.fill_(math.log(3.0))
    p = points(radius=1.4)
    out = geometry(p, output_normal=True)
    u = p / 2
    torch.testing.assert_close(out["features"], u)
    torch.testing.assert_close(out["density"][:, 0], 3 * (u[:, 0] + 2 * u[:, 1] - u[:, 2]) + 0.5)
    expected = -torch.tensor([1.0, 2.0, -1.0]) / math.sqrt(6.0)
    torch.testing.assert_close(out["normal"], expected.expand(40, 3), atol=1e-2, rtol=0)
    torch.testing.assert_close(geometry.export(p)["features"], u)


def test_volume_grid_blob():
    geometry = threestudio.find("volume-grid")({"grid_size": [2, 2, 2]})
    assert "density_scale" not in dict(geometry.named_parameters())
    x = points()
    expected = torch.nn.functional.softplus(5 * (1 - x.norm(dim=-1, keepdim=True) / 0.5))
    torch.testing.assert_close(geometry(x)["density"], expected)


# -- materials and backgrounds -------------------------------------------------------------------


def test_point_light():
    material = threestudio.find("diffuse-with-point-light-material")(
        {"ambient_only_steps": 100, "diffuse_prob": 1.0, "textureless_prob": 0.0}
    )
    features, n = torch.randn(5, 3), torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
    x, light = torch.randn(5, 3), torch.randn(5, 3)
    cosine = ((light - x) / (light - x).norm(dim=-1, keepdim=True) * n).sum(-1, keepdim=True)
    lit = 0.1 + 0.9 * cosine.clamp(min=0)
    albedo = features.sigmoid()
    material.update_step(0, 50)
    torch.testing.assert_close(material(features, x, n, light), albedo)
    material.update_step(0, 100)
    torch.testing.assert_close(material(features, x, n, light), albedo * lit)
    for shading, expected in (("albedo", albedo), ("textureless", lit.expand(5, 3))):
        torch.testing.assert_close(material(features, x, n, light, shading=shading), expected)
    mixed = material(features, x, n, light, ambient_ratio=0.25, shading="diffuse")
    torch.testing.assert_close(mixed, albedo * (0.25 + 0.75 * cosine.clamp(min=0)))
    torch.testing.assert_close(material.eval()(features, x, n, light), albedo * lit)
    torch.testing.assert_close(material.export(features)["albedo"], albedo)
    assert material.requires_normal
    only = threestudio.find("diffuse-with-point-light-material")({"ambient_only_on_test": True})
    torch.testing.assert_close(only.eval()(features, x, n, light), albedo)


def test_no_material_with_a_network():
    material = threestudio.find("no-material")(
        {
            "input_feature_dims": 6,
            "mlp_network_config": {"otype": "VanillaMLP", "n_neurons": 4, "n_hidden_layers": 1},
        }
    )
    x = torch.randn(2, 5, 6)
    expected = material.network(x.reshape(-1, 6)).sigmoid().reshape(2, 5, 3)
    torch.testing.assert_close(material(x), expected)
    with pytest.raises(ValueError, match="go together"):
        threestudio.find("no-material")({"input_feature_dims": 6})


def unit_directions():
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(2, 3, 4, 3), dim=-1)


def test_environment_map():
    background = threestudio.find("neural-environment-map-background")(
        {"random_aug": True, "random_aug_prob": 1.0, "eval_color": [0.1, 0.2, 0.3]}
    )
    dirs = unit_directions()
    assert sorted(background.state_dict()) == [f"network.layers.{i}.weight" for i in (0, 2, 4)]
    flat = background(dirs)
    assert torch.equal(flat, flat[:, :1, :1].expand_as(flat)) and not torch.equal(*flat)
    torch.testing.assert_close(
        background.eval()(dirs), torch.tensor([0.1, 0.2, 0.3]).expand(2, 3, 4, 3)
    )
    background = threestudio.find("neural-environment-map-background")({})
    out = background(dirs)
    assert out.shape == (2, 3, 4, 3) and out.std() > 0
    # a direction has one colour, wherever in the picture it is
    torch.testing.assert_close(background(dirs.flip(1)), out.flip(1))


def test_textured_background_by_longitude_and_latitude():
    background = threestudio.find("textured-background")(
        {"height": 2, "width": 4, "color_activation": "none"}
    )
    with torch.no_grad():
        background.texture.copy_(torch.arange(8.0).reshape(1, 1, 2, 4).expand(1, 3, 2, 4))
    angle = math.radians(45)
    # the middles of the four columns: -135, -45, 45 and 135 degrees; the rows: 45 and 135 from +z
    dirs = [
        [math.sin(p) * math.cos(a), math.sin(p) * math.sin(a), math.cos(p)]
        for p in (angle, 3 * angle)
        for a in (-3 * angle, -angle, angle, 3 * angle)
    ]
    out = background(torch.tensor(dirs).reshape(1, 2, 4, 3))
    torch.testing.assert_close(out[0, ..., 0], torch.arange(8.0).reshape(2, 4), atol=1e-5, rtol=0)
