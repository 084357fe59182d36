"""Fixtures shared by all tests: the extension, loaded as launch.py loads it, and tiny models."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def lods():
    """The package ``lods``, which the extension's door has imported as launch.py does."""
    from threestudio.utils.extensions import load_extension

    return load_extension(ROOT / "custom" / "threestudio-lods").lods


def made_once(factory, name, make):
    """A function that makes a model, once per set of arguments."""
    made = {}

    def once(**kwargs):
        key = tuple(sorted(kwargs.items()))
        if key not in made:
            made[key] = make(factory.mktemp(name), **kwargs)
        return str(made[key])

    return once


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """``tiny_sd(prediction_type="epsilon", width=32, tokens=16) -> folder`` of a random
    StableDiffusionPipeline, made once per set of arguments."""
    from tests.tiny_models import make_tiny_sd

    return made_once(tmp_path_factory, "tiny_sd", make_tiny_sd)


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """``tiny_sd3(t5=0, shift=3.0, camera_tokens=0, ...) -> folder`` of a random
    StableDiffusion3Pipeline, made once per set of arguments."""
    from tests.tiny_models import make_tiny_sd3

    return made_once(tmp_path_factory, "tiny_sd3", make_tiny_sd3)


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory):
    """``tiny_sana(shift=3.0, ...) -> folder`` of a random SanaPipeline, made once per set of
    arguments."""
    from tests.tiny_masked import write_sana

    return made_once(tmp_path_factory, "tiny_sana", write_sana)


@pytest.fixture(scope="session")
def tiny_pixart(tmp_path_factory):
    """``tiny_pixart(...) -> folder`` of a random PixArtSigmaPipeline, made once per set of
    arguments."""
    from tests.tiny_masked import write_pixart

    return made_once(tmp_path_factory, "tiny_pixart", write_pixart)


@pytest.fixture(scope="session")
def tiny_flow(tmp_path_factory):
    """``tiny_flow(family, ...) -> folder`` of a random pipeline of one of ``tests.tiny_flows``'
    FAMILIES, made once per set of arguments."""
    from tests.tiny_flows import FAMILIES

    makers = {
        name: made_once(tmp_path_factory, f"tiny_{name}", write) for name, write in FAMILIES.items()
    }
    return lambda family, **options: makers[family](**options)


@pytest.fixture(scope="session")
def tiny_multiview(tmp_path_factory):
    """``tiny_multiview(views=4, ...) -> folder`` of a random multi-view model, made once per set of
    arguments."""
    from tests.tiny_models import make_tiny_multiview

    return made_once(tmp_path_factory, "tiny_multiview", make_tiny_multiview)


@pytest.fixture(scope="session")
def tiny_adapted(tmp_path_factory):
    """``tiny_adapted(...) -> folder`` of a random model with an adapter that lets it see six views,
    made once per set of arguments."""
    from tests.tiny_models import make_tiny_adapted

    return made_once(tmp_path_factory, "tiny_adapted", make_tiny_adapted)


@pytest.fixture
def registered():
    """What a test registers is taken back after it."""
    from lods.gaussians import backends
    from lods.methods import registry
    from lods.models import families

    import threestudio

    tables = registry._methods, families.FAMILIES, backends._registered, threestudio.__modules__
    before = [dict(table) for table in tables]
    yield
    for table, names in zip(tables, before):
        for name in set(table) - set(names):
            del table[name]


def pytest_configure(config):
    from tests.signals import hear_signals

    hear_signals()


# --- garbage --------------------------------------------------------------------------------------
# What imports make stays until the end: half a million objects. Whatever looks for garbage, as each
# prompt processor does, would go through all of them each time.

_frozen = 0  # modules that were there when what they hold was last set apart


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Collecting imports everything, and nobody looks for garbage meanwhile."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_runtest_setup(item):
    """What imports have made by now is set apart."""
    global _frozen
    if len(sys.modules) > _frozen + 100:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)
