"""Meshes as a library: what importing them loads, and where their names are."""

import pytest
from lods import meshes

from tests import libraries

HEAVY = ("torch", "numba", "xatlas", "scipy", "trimesh", "threestudio")


@pytest.mark.slow
def test_importing_them_loads_nothing_heavy():
    """Nor do their modules load the host, or what makes texture coordinates or draws."""
    later = ("numba", "xatlas", "trimesh", "threestudio")
    assert libraries.loads("meshes", HEAVY, later) == ["[]", "[]"]


def test_every_public_name_is_found_where_it_is_said_to_be():
    libraries.check_names(meshes)


def test_no_module_of_them_names_the_host():
    libraries.check_no_host("meshes")
