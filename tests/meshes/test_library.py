"""Meshes as a library: what importing them loads, and where their names are."""

import subprocess
import sys

import pytest
from lods import meshes

from tests.runs import ROOT

LIBRARY = ROOT / "custom" / "threestudio-lods" / "lods"


@pytest.mark.slow
def test_importing_them_loads_nothing_heavy():
    """Nor do their modules load the host, or what makes texture coordinates or draws."""
    code = (
        "import sys, lods.meshes as meshes; "
        "heavy = {'torch', 'numba', 'xatlas', 'scipy', 'trimesh', 'threestudio'}; "
        "print(sorted(heavy & set(sys.modules))); "
        "[getattr(meshes, name) for name in meshes.__all__]; "
        "print(sorted({'numba', 'xatlas', 'trimesh', 'threestudio'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=LIBRARY.parent, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr


def test_every_public_name_is_found_where_it_is_said_to_be():
    assert set(meshes.__all__) == {
        n for names in meshes._MODULES.values() for n in names
    } and meshes.__all__ == sorted(meshes.__all__)
    for name in meshes.__all__:
        assert getattr(meshes, name).__name__ == name and getattr(meshes, name).__doc__
    assert set(meshes.__all__) <= set(dir(meshes))
    with pytest.raises(AttributeError, match="no attribute 'rasterisation'"):
        meshes.rasterisation  # noqa: B018


def test_no_module_of_them_names_the_host():
    for path in (LIBRARY / "meshes").rglob("*.py"):
        text = path.read_text()
        for words in ("import threestudio", "from threestudio", "lods.threestudio", "import *"):
            assert words not in text, path
