"""The extension keeps to what upstream threestudio has: its drop-in use depends on it."""

import ast
import importlib.util
import sys

import pytest

from tests.runs import ROOT
from tests.surface_fields import CONFIGS

EXTENSION = ROOT / "custom" / "threestudio-lods"

# what published extensions import from threestudio 0.2.3, by module
PUBLIC = {
    "threestudio.data.uncond": {
        "RandomCameraDataModule",
        "RandomCameraDataModuleConfig",
        "RandomCameraDataset",
        "RandomCameraIterableDataset",
    },
    "threestudio.models.background.base": {"BaseBackground"},
    "threestudio.models.exporters.base": {"Exporter", "ExporterOutput"},
    "threestudio.models.geometry.base": {"BaseGeometry"},
    "threestudio.models.materials.base": {"BaseMaterial"},
    "threestudio.models.mesh": {"Mesh"},
    "threestudio.models.networks": {"get_encoding", "get_mlp"},
    "threestudio.models.prompt_processors.base": {"PromptProcessorOutput"},
    "threestudio.models.renderers.base": {"Rasterizer"},
    "threestudio.systems.base": {"BaseLift3DSystem", "BaseSystem"},
    "threestudio.systems.utils": {"parse_optimizer", "parse_scheduler"},
    "threestudio.utils.base": {"BaseModule", "BaseObject", "Updateable"},
    "threestudio.utils.config": {"ExperimentConfig", "load_config", "parse_structured"},
    "threestudio.utils.loss": {"tv_loss"},
    "threestudio.utils.misc": {"C", "barrier", "cleanup", "get_device", "get_rank"},
    "threestudio.utils.ops": {
        "binary_cross_entropy",
        "dot",
        "get_activation",
        "get_cam_info_gaussian",
        "get_mvp_matrix",
        "get_projection_matrix",
        "get_ray_directions",
        "get_rays",
    },
    "threestudio.utils.typing": {"*"},
}
ATTRIBUTES = {"__version__", "debug", "find", "info", "register", "warn"}


def uses(source: str):
    """(module, name) of everything taken from threestudio by an import or as an attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "threestudio":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.startswith("threestudio."))
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "threestudio":
            yield "threestudio", node.attr


def private(source: str):
    public = {**PUBLIC, "threestudio": ATTRIBUTES}
    return [use for use in uses(source) if use[1] not in public.get(use[0], ())]


def test_the_extension_imports_public_names_only():
    found = {
        f"{path.relative_to(EXTENSION)}: {use}"
        for path in EXTENSION.rglob("*.py")
        for use in private(path.read_text())
    }
    assert not found


def test_that_test_sees_a_private_name():
    assert private("from threestudio.utils.errors import UserError")
    assert private("import threestudio.utils.errors")
    assert private("import threestudio\nthreestudio.logger.info('x')")
    assert not private("import threestudio\nfrom threestudio.utils.misc import C")


def test_names_do_not_clash(lods):
    import threestudio

    ours = [n for n, c in threestudio.__modules__.items() if c.__module__.startswith(lods.__name__)]
    assert len(ours) >= 8 and all(name.startswith("lods-") for name in ours)


def test_loading_twice_as_upstream_loads(lods):
    """Upstream executes ``__init__.py`` whether or not the extension is loaded already."""
    import threestudio

    before = dict(threestudio.__modules__)
    spec = importlib.util.spec_from_file_location(
        EXTENSION.name, EXTENSION / "__init__.py", submodule_search_locations=[str(EXTENSION)]
    )
    module = importlib.util.module_from_spec(spec)
    known = sys.modules[EXTENSION.name]
    sys.modules[EXTENSION.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules[EXTENSION.name] = known
    assert threestudio.__modules__ == before
    assert module.lods is lods


# our class with the fields of upstream's, and those that it has beside them
BASES = {"lods-prompt-processor": "stable-diffusion-prompt-processor"}
OWN = {
    "stable-diffusion-prompt-processor": {"source_prompt", "source_suffix", "nfsd_negative_prompt"}
}
PAIRS = {"gs": "pocket-shapes.yaml", "ngp": "pocket-shapes-ngp.yaml"}


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("learned", ["embedding", "lora"])
@pytest.mark.parametrize("backbone", PAIRS)
def test_shipped_keys_are_upstreams(lods, backbone, learned, overlay):
    """Upstream's parts get no field that only ours know."""
    files = [f"lods-{backbone}-{learned}.yaml", *([PAIRS[backbone]] if overlay else [])]
    merged = importlib.import_module("lods.merge")
    cfg = merged.for_upstream(merged.merge([ROOT / "configs" / name for name in files]))[0]
    assert cfg.data_type == "random-camera-datamodule"
    kinds = {"threestudio.data.uncond:RandomCameraDataModuleConfig": cfg.data}
    for key, kind in cfg.system.items():
        if key.endswith("_type"):
            kinds[BASES.get(kind, kind)] = cfg.system.get(key[: -len("_type")], {})
    known = {kind: fields for kind, fields in kinds.items() if kind in CONFIGS}
    assert len(known) >= 4  # data, prompt processor, material, background
    odd = {
        kind: set(fields) - set(CONFIGS[kind]) - OWN.get(kind, set())
        for kind, fields in known.items()
    }
    assert not any(odd.values()), odd
    top = set(cfg) - set(CONFIGS["threestudio.utils.config:ExperimentConfig"])
    assert not top
