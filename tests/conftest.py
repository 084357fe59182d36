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


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """``tiny_sd(prediction_type="epsilon", width=32, tokens=16) -> folder`` of a random
    StableDiffusionPipeline, made once per set of arguments."""
    from tests.tiny_models import make_tiny_sd

    made = {}

    def make(**kwargs):
        key = tuple(sorted(kwargs.items()))
        if key not in made:
            made[key] = make_tiny_sd(tmp_path_factory.mktemp("tiny_sd"), **kwargs)
        return str(made[key])

    return make


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """``tiny_sd3(t5=0, shift=3.0, camera_tokens=0, ...) -> folder`` of a random
    StableDiffusion3Pipeline, made once per set of arguments."""
    from tests.tiny_models import make_tiny_sd3

    made = {}

    def make(**kwargs):
        key = tuple(sorted(kwargs.items()))
        if key not in made:
            made[key] = make_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3"), **kwargs)
        return str(made[key])

    return make


@pytest.fixture(scope="session")
def tiny_multiview(tmp_path_factory):
    """``tiny_multiview(views=4, ...) -> folder`` of a random multi-view model, made once per set of
    arguments."""
    from tests.tiny_models import make_tiny_multiview

    made = {}

    def make(**kwargs):
        key = tuple(sorted(kwargs.items()))
        if key not in made:
            made[key] = make_tiny_multiview(tmp_path_factory.mktemp("tiny_multiview"), **kwargs)
        return str(made[key])

    return make


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
