"""The public names of threestudio 0.2.x that extensions and YAML files use, with their signatures.

The tables are in ``surface_names`` and ``surface_fields``.
"""

import dataclasses
import importlib
import inspect
import math
import re

import pytest
import torch
from omegaconf import OmegaConf

import threestudio
from tests.runs import ROOT
from tests.surface_fields import CONFIGS
from tests.surface_names import (
    CLASSES,
    FUNCTIONS,
    LEFT_OUT,
    LEFT_OUT_OF_OPS,
    PROPERTIES,
    REGISTERED,
    RESOLVERS,
    TYPING,
    UPSTREAM_REGISTERED,
)
from threestudio.utils.config import parse_structured


def get(path):
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def parameters(signature):
    """Of a parameter list in Python, as a list."""
    function = eval(f"lambda {signature}: None")
    return list(inspect.signature(function).parameters.values())


def plain(value):
    if isinstance(value, (list, tuple)) or OmegaConf.is_list(value):
        return [plain(v) for v in value]
    if isinstance(value, dict) or OmegaConf.is_dict(value):
        return {k: plain(v) for k, v in value.items()}
    return value


def assert_signature(function, expected, where):
    """`function` can be called in every way that the signature `expected` allows."""
    if expected is None:
        assert callable(function), where
        return
    ours = list(inspect.signature(function).parameters.values())
    wanted = parameters(expected)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for i, want in enumerate(wanted):
        have = next((p for p in ours if p.kind == want.kind and want.kind in variadic), None)
        if want.kind not in variadic:
            have = ours[i] if i < len(ours) else None
        assert have is not None, f"{where}: {want} is missing"
        if want.kind not in variadic:
            assert have.name == want.name, f"{where}: {have} instead of {want}"
        if want.default is not inspect.Parameter.empty:
            assert have.default is not inspect.Parameter.empty, f"{where}: {want} has no default"
            if not (have.default is None and want.default == {}):  # None for a mutable default
                assert plain(have.default) == plain(want.default), f"{where}: {have}, not {want}"
    positional = [p for p in ours if p.kind not in variadic][
        len([w for w in wanted if w.kind not in variadic]) :
    ]
    needed = [p.name for p in positional if p.default is inspect.Parameter.empty]
    assert not needed, f"{where} also needs {needed}"


@pytest.mark.parametrize("module", FUNCTIONS)
def test_functions(module):
    for name, expected in FUNCTIONS[module].items():
        assert_signature(get(f"{module}:{name}"), expected, f"{module}.{name}")


@pytest.mark.parametrize("path", CLASSES)
def test_classes(path):
    cls, (constructor, methods) = get(path), CLASSES[path]
    assert inspect.isclass(cls)
    assert_signature(cls, constructor, path)
    for name, expected in methods.items():
        assert_signature(getattr(cls, name), expected, f"{path}.{name}")
    for name in PROPERTIES.get(path, "").split():
        assert isinstance(inspect.getattr_static(cls, name), property), f"{path}.{name}"


def test_the_check_of_signatures_can_fail():
    def function(a, b=1, *, c, **rest):
        pass

    assert_signature(lambda a, b=1, c=2: 0, "a, b=1", "x")
    for expected in ("b, a", "a, b=2, *args", "a, b, c, d", "a, b=1", "a, c=1"):
        with pytest.raises(AssertionError):
            assert_signature(function, expected, "x")


def test_names_of_the_package():
    assert threestudio.__version__ == "0.2.3"
    assert threestudio.logger.name == "pytorch_lightning"
    for name in ("data", "models", "systems", "utils"):
        assert inspect.ismodule(getattr(threestudio, name))
    for name in REGISTERED.split():
        assert threestudio.find(name) is threestudio.__modules__[name]
    for name in LEFT_OUT:
        with pytest.raises(KeyError):
            threestudio.find(name)
    ops = get("threestudio.utils.ops")
    assert not [name for name in LEFT_OUT_OF_OPS if hasattr(ops, name)]
    assert float(ops.SpecifyGradient.apply(torch.ones(2), torch.ones(2))) == 1


def test_the_documentation_lists_what_is_missing():
    every = set(UPSTREAM_REGISTERED.split())
    assert len(every) == 55 and every >= set(REGISTERED.split())
    text = (ROOT / "docs" / "upstream.md").read_text()
    part = text.split("## What is missing")[1].split("## ")[0]
    named = {name for name in re.findall(r"`([a-z0-9-]+)`", part) if name in every}
    assert named == every - set(threestudio.__modules__)


def test_typing_names():
    names: dict = {}
    exec("from threestudio.utils.typing import *", names)
    assert set(TYPING.split()) <= set(names)


def test_resolvers():
    assert [name for name in RESOLVERS.split() if not OmegaConf.has_resolver(name)] == []


def test_kinds_of_classes():
    base, system = get("threestudio.utils.base"), get("threestudio.systems.base:BaseSystem")
    import pytorch_lightning as pl

    saver = get("threestudio.utils.saving:SaverMixin")
    assert issubclass(system, (pl.LightningModule,)) and issubclass(system, saver)
    assert issubclass(system, base.Updateable) and issubclass(base.BaseModule, torch.nn.Module)
    assert not issubclass(base.BaseObject, torch.nn.Module)
    assert issubclass(threestudio.find("stable-diffusion-guidance"), base.BaseObject)
    renderer = get("threestudio.models.renderers.base")
    assert issubclass(renderer.Rasterizer, renderer.Renderer)
    assert issubclass(renderer.VolumeRenderer, renderer.Renderer)
    material = get("threestudio.models.materials.base:BaseMaterial")
    assert (material.requires_normal, material.requires_tangent) == (False, False)
    assert issubclass(
        threestudio.find("random-camera-datamodule"), pl.LightningDataModule
    ) and issubclass(
        get("threestudio.data.uncond:RandomCameraIterableDataset"), torch.utils.data.IterableDataset
    )
    optimizer = get("threestudio.systems.optimizers:Adan")
    assert issubclass(optimizer, torch.optim.Optimizer)


def test_constants_of_the_saver():
    saver = get("threestudio.utils.saving:SaverMixin")
    assert saver.DEFAULT_RGB_KWARGS == {"data_format": "HWC", "data_range": (0, 1)}
    uv = {"data_format": "HWC", "data_range": (0, 1), "cmap": "checkerboard"}
    assert uv == saver.DEFAULT_UV_KWARGS
    assert saver.DEFAULT_GRAYSCALE_KWARGS == {"data_range": None, "cmap": "jet"}
    assert saver.DEFAULT_GRID_KWARGS == {"align": "max"}


def test_attributes_that_subclasses_of_the_data_module_use():
    config = get("threestudio.data.uncond:RandomCameraDataModuleConfig")
    cfg = parse_structured(config, {"height": 8, "width": 9})
    dataset = get("threestudio.data.uncond:RandomCameraIterableDataset")(cfg)
    assert (dataset.height, dataset.width, dataset.batch_size) == (8, 9, 1)
    assert (dataset.heights, dataset.widths, dataset.batch_sizes) == ([8], [9], [1])
    assert dataset.resolution_milestones == []
    assert dataset.directions_unit_focal.shape == dataset.directions_unit_focals[0].shape
    ranges = ("elevation_range", "azimuth_range", "camera_distance_range", "fovy_range")
    assert [list(getattr(dataset, name)) for name in ranges] == [
        [-10, 90],
        [-180, 180],
        [1, 1.5],
        [40, 70],
    ]


@pytest.mark.parametrize("fovx, fovy", [(0.9, 0.9), (1.2, 0.7)])
def test_cam_info_gaussian_in_closed_form(fovx, fovy):
    """A camera at (d, 0, 0) that looks at the origin with z up sees the point (x, y, z) at depth
    d - x, y to the right and z up."""
    function = get("threestudio.utils.ops:get_cam_info_gaussian")
    d, near, far = 3.0, 0.1, 100.0
    c2w = torch.tensor([[0.0, 0, 1, d], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    world_view, full, centre = function(
        c2w=c2w, fovx=torch.tensor(fovx), fovy=fovy, znear=near, zfar=far
    )
    x, y, z = point = torch.tensor([0.5, 0.4, -0.3])
    row = torch.cat([point, torch.ones(1)])
    torch.testing.assert_close(row @ world_view, torch.stack([y, -z, d - x, torch.ones(())]))
    clip, depth = row @ full, d - x
    torch.testing.assert_close(clip[3], depth)
    torch.testing.assert_close(clip[0] / clip[3], y / depth / math.tan(fovx / 2))
    torch.testing.assert_close(clip[1] / clip[3], -z / depth / math.tan(fovy / 2))
    expected_z = far / (far - near) * (1 - near / depth)  # 0 at near, 1 at far
    torch.testing.assert_close(clip[2] / clip[3], expected_z)
    assert centre.tolist() == [d, 0, 0]


def test_cam_info_gaussian_stays_on_the_device_of_the_camera(monkeypatch):
    ops, made = get("threestudio.utils.ops"), []
    whole = ops.get_projection_matrix_gaussian

    def spy(*args, **kwargs):
        made.append(whole(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(ops, "get_projection_matrix_gaussian", spy)
    out = ops.get_cam_info_gaussian(torch.eye(4, device="meta"), 0.9, 0.9, 0.1, 100)
    assert [t.device.type for t in (*out, *made)] == ["meta"] * 4


# --- fields of configurations ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_and_defaults(name):
    cls = get(name) if ":" in name else threestudio.find(name)
    config = cls if dataclasses.is_dataclass(cls) else cls.Config
    fields = {}
    for field in dataclasses.fields(config):
        made = field.default_factory
        fields[field.name] = field.default if made is dataclasses.MISSING else made()
    for field, default in CONFIGS[name].items():
        assert field in fields, f"{name} has no {field}"
        assert plain(fields[field]) == plain(default), f"{name}.{field}"


def test_guidance_is_called_as_systems_call_it():
    guidance = threestudio.find("stable-diffusion-guidance")
    expected = "self, rgb, prompt_utils, elevation, azimuth, camera_distances, "
    expected += "rgb_as_latents=False, guidance_eval=False, **kwargs"
    assert_signature(guidance.__call__, expected, "stable-diffusion-guidance")
