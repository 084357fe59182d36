"""The library alone: nothing of it but the adapters knows threestudio."""

import ast
import functools
import json
import subprocess
import sys

import pytest
from lods.methods import registry

from tests.runs import ROOT

FOLDER = ROOT / "custom" / "threestudio-lods"
FILES = sorted((FOLDER / "lods").rglob("*.py"))
LIBRARY = [f for f in FILES if FOLDER / "lods" / "threestudio" not in f.parents]


@functools.cache
def nodes(file):
    return list(ast.walk(ast.parse(file.read_text())))


def imported(file):
    """The names of the modules that a file imports, anywhere in it."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import has another name in a copy"
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def test_no_file_but_the_adapters_imports_the_host():
    assert len(LIBRARY) > 40
    for file in LIBRARY:
        names = set(imported(file))
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"threestudio", "evaluation", "pocket", "tests"}, file
        assert not [name for name in names if name.startswith("lods.threestudio")], file


def test_the_formulas_import_torch_only():
    found = {name.split(".")[0] for name in imported(FOLDER / "lods" / "scores.py")}
    assert found - set(sys.stdlib_module_names) == {"torch"}


def test_nothing_is_imported_by_a_star():
    for file in FILES:
        for node in nodes(file):
            if isinstance(node, ast.ImportFrom):
                assert [alias.name for alias in node.names] != ["*"], file


ALONE = """
import json, sys

class NoHost:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("threestudio", "evaluation", "pocket", "tests"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, NoHost())
sys.path.append(sys.argv[1])
import torch
import lods

torch.manual_seed(0)
model, out = lods.models.load(sys.argv[2]), {}
for name in lods.methods.names():
    edits = lods.methods.find(name).edits
    method = lods.load(name, model if "lora" not in name and "vsd" not in name else sys.argv[2],
                       "a red car", negative_prompt="a blue car",
                       **({"source_prompt": "a green car"} if edits else {}))
    cameras = lods.Cameras(*torch.rand(3, 2), *torch.rand(2, 2, 4, 4))
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    latents = torch.randn(2, *model.latent_shape, requires_grad=True)
    for step, given in enumerate(({"images": images}, {"latents": latents})):
        method.step(step)
        given |= {"source": torch.rand(2, 3, 8, 8)} if edits else {}
        method(**given, cameras=cameras).total.backward()
    path = method.save(f"{name}.safetensors")
    if path is not None:
        method.load(path)
    learned = [bool(p.grad.isfinite().all()) for p in method.parameters()]
    out[name] = [bool(images.grad.any()), bool(latents.grad.any()), path is not None, learned]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_every_method_works_in_an_empty_folder_without_a_host(tiny_sd, tmp_path):
    command = [sys.executable, "-I", "-c", ALONE, str(FOLDER), tiny_sd(sample_size=4)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(registry.ours())
    learning = {"lods-edit", "lods-embedding", "lods-lora", "lods-vsd"}
    for name, (images, latents, written, learned) in found.items():
        assert images and latents and written == (name in learning) == bool(learned), name
        assert all(learned)
    names = {f"{name}.safetensors" for name in learning}
    assert {path.name for path in tmp_path.iterdir()} == names
