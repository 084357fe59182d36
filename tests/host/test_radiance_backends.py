"""Absent CUDA packages of the radiance field: what is said, and what stands in for them."""

import re
import sys

import pytest
import torch

import threestudio

CUDA = torch.device("cuda")


@pytest.mark.parametrize("package", ["nerfacc", "tinycudann"])
def test_absent_packages_of_the_radiance_field_say_how_to_get_them(monkeypatch, package):
    from threestudio.models import hashgrid
    from threestudio.models.hashgrid import native
    from threestudio.models.raymarch import march, march_nerfacc

    cached, resolve, remedy = {
        "nerfacc": (march_nerfacc._not_loaded, march.resolve_backend, "pip install nerfacc"),
        "tinycudann": (
            native.missing,
            lambda *args: hashgrid.resolve_backend(*args, 3),
            r"pip install 'setuptools<81'.*pip install --no-build-isolation 'git.https",
        ),
    }[package]
    warnings = []
    monkeypatch.setattr(threestudio, "warn", warnings.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, package, None)
    for cache in (cached, march.announce, hashgrid.announce):
        cache.cache_clear()
    assert resolve("auto", CUDA, torch.float32) == "torch"
    (line,) = warnings
    assert re.search(f"{package}.*{remedy}", line)
    with pytest.raises(ValueError, match=f"{package}.*{remedy}") as error:
        resolve(package, CUDA, torch.float32)
    assert "\n" not in str(error.value)
    cached.cache_clear()
