"""Materials, backgrounds, and the holders of a scene."""

import pytest
import torch

import threestudio
from threestudio.models.exporters.base import Exporter
from threestudio.models.geometry.base import (
    BaseGeometry,
    BaseImplicitGeometry,
    contract_to_unisphere,
)
from threestudio.models.renderers.base import Rasterizer


def scene():
    return (
        BaseImplicitGeometry({"radius": 2.0}),
        threestudio.find("no-material")({}),
        threestudio.find("solid-color-background")({"learned": True}),
    )


def test_a_renderer_uses_the_scene_but_does_not_own_it():
    geometry, material, background = scene()
    renderer = Rasterizer({"radius": 2.0}, geometry, material, background)
    assert renderer.geometry is geometry and renderer.background is background
    assert list(renderer.parameters()) == [] and list(renderer.children()) == []
    assert list(renderer.state_dict()) == ["bbox"]
    assert renderer.bbox.tolist() == [[-2.0] * 3, [2.0] * 3]
    other = threestudio.find("solid-color-background")({})
    renderer.set_background(other)
    assert renderer.background is other and renderer.material is material


def test_a_renderer_updates_its_scene():
    geometry, material, background = scene()
    steps = []
    geometry.update_step = lambda *args, **kwargs: steps.append(args)
    Rasterizer({}, geometry, material, background).do_update_step(0, 7)
    assert steps == [(0, 7)]


def test_dummy_exporter_exports_nothing():
    exporter = threestudio.find("dummy-exporter")({"save_video": True}, *scene())
    assert isinstance(exporter, Exporter) and exporter() == [] and exporter.cfg.save_video


def test_base_geometry_refuses_conversion():
    with pytest.raises(TypeError, match="BaseGeometry"):
        BaseGeometry.create_from(BaseGeometry({}), {})


def test_no_material_applies_its_activation_only():
    material = threestudio.find("no-material")({"n_output_dims": 5})
    x = torch.randn(7, 5)
    torch.testing.assert_close(material(x, positions=None), torch.sigmoid(x))
    assert material.export(x)["albedo"].shape == (7, 3)
    assert not material.requires_normal
    with pytest.raises(ValueError, match="n_output_dims"):
        material(x[:, :4])


def test_solid_background():
    background = threestudio.find("solid-color-background")({"color": [0.1, 0.2, 0.3]})
    out = background(torch.zeros(2, 3, 4, 3))
    assert torch.equal(out, torch.tensor([0.1, 0.2, 0.3]).expand(2, 3, 4, 3))
    assert list(background.state_dict()) == ["env_color"] and not list(background.parameters())
    with pytest.raises(ValueError, match="n_output_dims"):
        threestudio.find("solid-color-background")({"color": [1.0]})


def test_random_background_is_one_colour_per_image_and_only_while_training():
    background = threestudio.find("solid-color-background")(
        {"random_aug": True, "random_aug_prob": 1.0, "learned": True}
    )
    dirs = torch.zeros(2, 3, 4, 3)
    out = background(dirs)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert not torch.equal(out[0], out[1]) and out.min() >= 0 and out.max() <= 1
    out.sum().backward()  # the learned colour stays in the graph
    assert torch.equal(background.env_color.grad, torch.zeros(3))
    assert torch.equal(background.eval()(dirs), torch.ones(2, 3, 4, 3))


def test_contraction_maps_the_box_and_all_of_space():
    box = torch.tensor([[-2.0, -2, -2], [2, 2, 2]])
    corners = torch.tensor([[-2.0, -2, -2], [0, 0, 0], [2, 2, 2]])
    expected = torch.tensor([[0.0] * 3, [0.5] * 3, [1.0] * 3])
    torch.testing.assert_close(contract_to_unisphere(corners, box), expected)
    x = torch.randn(100, 3) * 100
    kept = x.clone()
    y = contract_to_unisphere(x, box, unbounded=True)
    assert torch.equal(x, kept)
    assert ((y - 0.5).norm(dim=-1) < 0.5).all()
    inside = torch.tensor([[0.5, -1.0, 1.0]])  # |u| < 1: linear, at half the scale
    y = contract_to_unisphere(inside, box, unbounded=True)
    torch.testing.assert_close(y, inside / 8 + 0.5)
