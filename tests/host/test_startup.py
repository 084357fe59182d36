"""What a run imports before it begins, and when."""

import dataclasses
import os
import subprocess
import sys

import pytest
from lods.declared import method_names, settings_of
from lods.methods import registry

import threestudio
from tests.runs import ROOT
from threestudio.run.config_check import check_parts
from threestudio.run.declared import Sources
from threestudio.utils.config import load_config
from threestudio.utils.errors import UnknownNameError


def python(code, *words):
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)


# --- refusals ---

REFUSE = """
import sys
import launch
status = launch.main(sys.argv[1:])
heavy = {'torch', 'numpy', 'pytorch_lightning', 'diffusers', 'transformers'}
print(status, sorted(heavy & set(sys.modules)))
"""
GAUSSIANS = ("lods-gs-embedding", "pocket-shapes")
MISTAKES = {
    "data.widht=64": "'data.widht': did you mean 'width'",
    "system.sheet_view=3": "'system.sheet_view': did you mean 'sheet_views'",
    "system.geometry.init_tipe=ball": "'system.geometry.init_tipe': did you mean 'init_type'",
    "system.guidance.guidance_scal=7": "'system.guidance.guidance_scal': did you mean 'guidance_s",
    "system.prompt_processor.promt=a cat": "'system.prompt_processor.promt': did you mean 'promp",
    "system.exporter.format=ply": "'system.exporter.format': did you mean 'fmt'",
    "system.exporter.fmt=[ply,stl]": "system.exporter.fmt has 'stl': the formats are ply, points",
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_option_is_refused_before_anything_heavy_is_imported(mistake):
    words = ["system.prompt_processor.prompt=a red mushroom", mistake]
    done = python(REFUSE, "--config", *GAUSSIANS, "--train", *words)
    assert done.stdout == "2 []\n"
    assert done.stderr.count("\n") == 1 and MISTAKES[mistake] in done.stderr


def test_what_the_source_shows_of_a_class_is_what_the_class_has():
    threestudio.utils.extensions.load_custom_modules(ROOT / "custom")
    extension = ROOT / "custom" / "threestudio-lods"
    sources, unknown = Sources([extension]), set()
    for name, cls in threestudio.__modules__.items():
        if not hasattr(cls, "Config") or not cls.__module__.startswith(("threestudio.", "lods.")):
            continue
        fields = {field.name for field in dataclasses.fields(cls.Config) if field.init}
        shown = settings_of(name) or getattr(sources.declared(name), "names", None)
        if shown is None:
            unknown.add(name)
        else:
            assert shown == fields, name
    assert not unknown


def test_the_source_shows_the_names_of_our_methods():
    assert method_names() == sorted(registry.ours())


EXTENSION = """
import threestudio, dataclasses
class Base:
    @dataclasses.dataclass
    class Config:
        a: int = 1
def made(cls): return dataclasses.make_dataclass("Config", [("b", int, 2)], bases=(cls.Config,))
@threestudio.register("made")
class Made(Base):
    Config = made(Base)
@threestudio.register("plain")
class Plain(Base):
    class Config(Base.Config):
        c: int = 3
@threestudio.register("outside")
class Outside(other.Base):
    pass
@threestudio.register("depends")
class Depends(Base):
    @dataclasses.dataclass
    class Config(Base.Config):
        if sys.platform == "linux":
            d: int = 4
try:
    from elsewhere import Either
except ImportError:
    Either = Base
@threestudio.register("either")
class Takes(Either):
    pass
@changed
@threestudio.register("changed")
class Changed(Base):
    pass
@threestudio.register("clear")
class Clear(Base):
    @dataclasses.dataclass
    class Config(Base.Config):
        kind_type: str = "text"
"""


def test_what_the_source_does_not_show_is_left_to_the_run(tmp_path):
    (tmp_path / "one.py").write_text(EXTENSION)
    (tmp_path / "broken.py").write_text('threestudio.register("broken") class')
    sources = Sources([tmp_path])
    doubtful = ("made", "plain", "outside", "depends", "either", "changed", "broken", "nothing")
    for name in doubtful:
        assert sources.declared(name) is None, name
    clear = sources.declared("clear")
    assert (clear.where, clear.names) == ("Clear.Config", {"a", "kind_type"})
    assert clear.defaults == {"kind_type": "text"}


def test_an_unknown_guidance_is_refused_before_anything_is_built():
    files = [f"configs/{name}.yaml" for name in GAUSSIANS]
    words = ["system.prompt_processor.prompt=a cat", "system.guidance_type=lods-sdss-guidance"]
    threestudio.utils.extensions.load_custom_modules(ROOT / "custom")
    with pytest.raises(UnknownNameError, match="did you mean 'lods-sds-guidance'"):
        check_parts(load_config(*[str(ROOT / f) for f in files], cli_args=words), "train")
