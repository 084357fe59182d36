"""Registry, extensions, updates and base classes."""

import importlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import threestudio
from threestudio.utils import extensions, misc
from threestudio.utils.base import (
    BaseModule,
    BaseObject,
    Configurable,
    Updateable,
    update_end_if_possible,
    update_if_possible,
)
from threestudio.utils.errors import UserError
from threestudio.utils.typing import *


@pytest.fixture
def registry(monkeypatch):
    """A registry to write in."""
    monkeypatch.setattr(threestudio, "__modules__", dict(threestudio.__modules__))
    return threestudio.__modules__


# --- registry ---


def test_register_and_find(registry):
    @threestudio.register("h-thing")
    class Thing:
        pass

    assert threestudio.find("h-thing") is Thing
    with pytest.raises(ValueError, match="'h-thing' exists already"):
        threestudio.register("h-thing")(Thing)
    assert misc.parse_version(threestudio.__version__) >= misc.parse_version("0.2.1")


def test_composition_puts_mixins_first(registry):
    def make(name):
        return threestudio.register(name)(type(name, (), {"who": name}))

    main, a, b = make("h-main"), make("h-a"), make("h-b")
    composed = threestudio.find("h-main:h-a,h-b")
    assert composed.__mro__[1:4] == (a, b, main) and composed.who == "h-a"
    assert composed.__name__ == "h-main.h-a,h-b" and composed.__name__ not in registry


def test_unknown_names_are_answered(registry, monkeypatch):
    threestudio.register("lods-embedding-thing")(object)
    monkeypatch.setitem(extensions.failed, "broken-extension", ImportError("no module\nnamed x"))
    with pytest.raises(KeyError) as caught:
        threestudio.find("lods-embeding-thing")
    message = str(caught.value)
    assert "'lods-embeding-thing': did you mean 'lods-embedding-thing'?" in message
    assert "extension 'broken-extension' failed to load: ImportError: named x" in message
    assert isinstance(caught.value, UserError) and "\n" not in message
    threestudio.register("lods-xyz-thing")(object)
    for part in ("xyz", "xyyz"):
        with pytest.raises(KeyError, match=f"'{part}': did you mean 'lods-xyz-thing'"):
            threestudio.find(part)
    with pytest.raises(KeyError, match="is empty"):
        threestudio.find("")


def test_logging():
    class Keep(logging.Handler):
        def __init__(self):
            super().__init__()
            self.lines = []

        def emit(self, record):
            self.lines.append((record.levelname, record.getMessage()))

    keep = Keep()
    threestudio.logger.addHandler(keep)
    try:
        threestudio.warn("mind the %s", "gap")
    finally:
        threestudio.logger.removeHandler(keep)
    assert keep.lines == [("WARNING", "mind the gap")]
    assert threestudio.rank_zero_only(lambda: 3)() == 3


# --- extensions ---


@pytest.fixture
def custom(tmp_path, registry):
    """A custom/ folder with extensions in all conditions."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("h-good-ext/__init__.py", "from .part import Part\nLOADED = True")
    write(
        "h-good-ext/part.py",
        "import threestudio\n@threestudio.register('h-part')\nclass Part: pass",
    )
    write("h-good-ext/light.py", "import sys\nHEAVY = 'h-good-ext.part' in sys.modules")
    write(
        "h-bad-ext/__init__.py",
        "import threestudio\nthreestudio.register('h-bad')(type('Bad', (), {'__module__': "
        "__name__}))\nraise RuntimeError('no\\nluck')",
    )
    write("h_single.py", "VALUE = 3")
    write("h-off_disabled/__init__.py", "raise SystemExit")
    write("__pycache__/x.py", "raise SystemExit")
    write("notes.txt", "raise SystemExit")
    (tmp_path / "h-empty").mkdir()
    yield tmp_path
    for name in [m for m in sys.modules if m.split(".")[0].startswith(("h-", "h_"))]:
        del sys.modules[name]
    for errors in (extensions.failed, extensions._to_report):
        for name in [n for n in errors if n.startswith("h-")]:
            del errors[name]


def test_a_folder_of_extensions(custom):
    result = extensions.load_custom_modules(custom)
    assert list(result) == ["h-bad-ext", "h-empty", "h-good-ext", "h_single"]
    assert result["h-good-ext"] is None and result["h_single"] is None
    assert isinstance(result["h-bad-ext"], RuntimeError)
    assert isinstance(result["h-empty"], ImportError)
    assert threestudio.find("h-part").__module__ == "h-good-ext.part"
    assert importlib.import_module("h-good-ext.part").Part is threestudio.find("h-part")
    assert "h-bad-ext" not in sys.modules
    with pytest.raises(KeyError, match="'h-bad-ext' failed to load: RuntimeError: luck"):
        threestudio.find("h-bad")  # what it had registered is taken back
    assert extensions.load_custom_modules(custom / "nowhere") == {}


def test_a_folder_and_a_file_of_one_name(custom, monkeypatch):
    """The folder is loaded, and the user is told of the other."""
    (custom / "h-good-ext.py").write_text("raise SystemExit")
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    assert extensions.load_custom_modules(custom)["h-good-ext"] is None
    extensions.report_failures()
    (line,) = [s for s in said if "h-good-ext" in s]
    assert "h-good-ext.py is not loaded: " in line and "has the same name" in line


def test_loading_twice_returns_the_same_module(custom, tmp_path, registry):
    module = extensions.load_extension(custom / "h-good-ext")
    assert module.LOADED and extensions.load_extension(custom / "h-good-ext") is module
    before = dict(registry)
    link = tmp_path / "h-linked_disabled"
    link.symlink_to(custom)
    for root in (custom, link, custom / "h-good-ext" / ".."):
        assert extensions.load_custom_modules(root)["h-good-ext"] is None
    assert registry == before
    other = tmp_path / "else" / "h-good-ext"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    with pytest.raises(ImportError, match="already loaded from"):
        extensions.load_extension(other)


def test_extensions_may_import_one_another(custom):
    """In whatever order they come; one that needs itself, or what is not there, fails."""
    for name, needs in (
        ("h-a", "h-b"),
        ("h-b", "h-good-ext.part"),
        ("h-c", "h-none"),
        ("h-d", "h-d.part"),
        ("h-e", "h-f"),
        ("h-f", "h-e.part"),
    ):
        (custom / name).mkdir()
        text = f"import importlib\nimportlib.import_module({needs!r})\n"
        (custom / name / "__init__.py").write_text(text)
    result = extensions.load_custom_modules(custom)
    assert result["h-a"] is result["h-b"] is result["h-good-ext"] is None
    assert set(result) >= {"h-a", "h-b", "h-c", "h-d", "h-e", "h-f"}
    for name in ("h-c", "h-d", "h-e", "h-f"):
        assert isinstance(result[name], ModuleNotFoundError), name


def test_two_extensions_that_register_one_name_are_both_named(custom, registry):
    for name in ("h-first", "h-second"):
        (custom / name).mkdir()
        (custom / name / "__init__.py").write_text("from . import part")
        text = "import threestudio\n@threestudio.register('h-same')\nclass Same: pass"
        (custom / name / "part.py").write_text(text)
    result = extensions.load_custom_modules(custom)
    assert result["h-first"] is None
    line = extensions.last_line(result["h-second"])
    assert "'h-same' exists already, from h-first.part, and h-second.part registers it" in line
    assert "_disabled" in line and "\n" not in line
    assert threestudio.find("h-same").__module__ == "h-first.part"
    (custom / "h-first").rename(custom / "h-first_disabled")


def test_failures_are_reported_once(custom, monkeypatch):
    said: list = []
    monkeypatch.setattr("threestudio.warn", said.append)
    extensions.load_custom_modules(custom)
    assert said == [], "not while loading"
    extensions.report_failures()
    assert said[0] == "extension 'h-bad-ext' failed to load: RuntimeError: luck"
    assert "extension 'h-empty' failed to load: ImportError: no extension at" in said[1]
    extensions.report_failures()
    assert len(said) == 2
    (custom / "h-bad-ext" / "__init__.py").write_text("")
    extensions.load_custom_modules(custom)
    extensions.report_failures()
    assert len(said) == 3 and "h-empty" in said[2], "one that was mended is not reported"


def test_a_submodule_alone_does_not_run_the_package(custom):
    light = extensions.load_extension(custom / "h-good-ext", submodule="light")
    assert light.__name__ == "h-good-ext.light" and light.HEAVY is False
    assert not hasattr(sys.modules["h-good-ext"], "LOADED")
    whole = extensions.load_extension(custom / "h-good-ext")
    assert whole.LOADED and whole is sys.modules["h-good-ext"]
    with pytest.raises(ImportError):
        extensions.load_extension(custom / "h-good-ext", submodule="nothing")
    assert sys.modules["h-good-ext"] is whole, "a wrong submodule does not unload the package"


# --- updates ---


class Leaf(Updateable):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.log.append((self.name, epoch, global_step, on_load_weights))

    def update_step_end(self, epoch, global_step):
        self.log.append((self.name, "end", global_step))


class Tree(BaseModule):
    def configure(self, log):
        self.log = log
        self.zeta, self.alpha = Leaf("zeta", log), Leaf("alpha", log)
        self._hidden, self.listed = Leaf("hidden", log), [Leaf("listed", log)]
        self.module = Branch({}, log)

    @property
    def made(self):
        return Leaf("made", self.log)

    @property
    def broken(self):
        raise RuntimeError("not ready")

    @property
    def _private(self):
        raise AssertionError("private names are not read")

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.log.append(("tree", epoch, global_step, on_load_weights))


class Branch(BaseModule):
    def configure(self, log):
        self.leaf = Leaf("module.leaf", log)


def test_updates_visit_children_in_order_then_the_parent():
    log: list = []
    tree = Tree({}, log)
    tree.do_update_step(1, 20, on_load_weights=True)
    assert [entry[0] for entry in log] == ["alpha", "made", "module.leaf", "zeta", "tree"]
    assert all(entry[1:] == (1, 20, True) for entry in log)
    log.clear()
    tree.do_update_step_end(1, 20)
    assert [entry[0] for entry in log] == ["alpha", "made", "module.leaf", "zeta"]
    log.clear()
    update_if_possible(tree.zeta, 0, 1)
    update_end_if_possible(tree.zeta, 0, 1)
    update_if_possible(object(), 0, 1)
    assert log == [("zeta", 0, 1, False), ("zeta", "end", 1)]


def test_an_update_does_not_read_the_properties_of_lightning():
    import pytorch_lightning as pl

    class System(pl.LightningModule, Updateable):
        reads = 0

        @property
        def trainer(self):  # raises, and slowly, on a LightningModule without trainer
            return super().trainer

        @property
        def mine(self):
            type(self).reads += 1
            return None

    from threestudio.utils.base import _class_names

    names = _class_names(System)
    assert "mine" in names and "example_input_array" not in names and "global_step" not in names
    System().do_update_step(0, 0)
    assert System.reads == 1


# --- base classes ---


def test_objects_are_configured():
    class Thing(BaseObject):
        @dataclass
        class Config(BaseObject.Config):
            size: int = 2

        def configure(self, extra, more=0):
            self.made = (self.cfg.size, extra, more)

    thing = Thing({"size": 5}, "x", more=1)
    assert thing.made == (5, "x", 1) and thing.device == misc.get_device()
    with pytest.raises(UserError, match=r"Thing\.Config has no field 'sise'"):
        Thing({"sise": 5}, "x")
    assert Configurable({}).cfg == {}


def test_module_weights_come_from_a_part_of_a_checkpoint(tmp_path):
    class Net(BaseModule):
        def configure(self):
            self.linear = torch.nn.Linear(2, 1)
            self.updates = []

        def update_step(self, epoch, global_step, on_load_weights=False):
            self.updates.append((epoch, global_step, on_load_weights))

    source = Net({})
    assert list(source.state_dict()) == ["linear.weight", "linear.bias"]  # no trace of _dummy
    folder = tmp_path / "a:b"  # a path may hold colons
    folder.mkdir()
    state = {f"geometry.net.{k}": v for k, v in source.state_dict().items()}
    path = folder / "x.ckpt"
    torch.save(
        {"state_dict": {**state, "other": torch.ones(1)}, "epoch": 1, "global_step": 7}, path
    )
    net = Net({"weights": f"{path}:geometry.net"})
    assert torch.equal(net.linear.weight, source.linear.weight)
    assert net.updates == [(1, 7, True)]
    with pytest.raises(UserError, match="no weights of a module called 'geometri'"):
        Net({"weights": f"{path}:geometri"})
    with pytest.raises(ValueError, match="module"):
        Net({"weights": "nothing"})
    kept, _, _ = misc.load_module_weights(path, ignore_modules=["geometry"])
    assert list(kept) == ["other"]
    kept, _, _ = misc.load_module_weights(path, ignore_modules=["other"])  # a parameter
    assert "other" not in kept and len(kept) == len(state)
    twice = ["geometry", "geometry.net", "geometry"]  # one within another
    assert list(misc.load_module_weights(path, ignore_modules=twice)[0]) == ["other"]
    assert misc.load_module_weights(path, ignore_modules=["geometry", "other"])[0] == {}
    with pytest.raises(UserError, match=r"no weights called 'geometri'.*did you mean 'geometry"):
        misc.load_module_weights(path, ignore_modules=["geometri"])
    with pytest.raises(ValueError, match="exclude each other"):
        misc.load_module_weights(path, module_name="a", ignore_modules=["b"])


# --- misc ---


def test_devices_and_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(misc, "_device_type", None)
    assert misc.get_device() == torch.device("cpu") and misc.get_rank() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert misc.get_device() == torch.device("cuda", 1) and misc.get_rank() == 5
    misc.set_device_type("cpu")
    assert misc.get_device() == torch.device("cpu")


def test_last_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a_car@1", "a_car@2", "b"):
        Path("runs", name).mkdir(parents=True)
    Path("runs/a_car@3").write_text("a file, not a folder")
    assert misc.find_last_path("runs/a carLAST/last.ckpt") == "runs/a_car@2/last.ckpt"
    assert misc.find_last_path("runs/LAST/x") == "runs/b/x"
    assert misc.find_last_path("runs/b/x y") == "runs/b/x y" and misc.find_last_path(None) is None
    with pytest.raises(FileNotFoundError):
        misc.find_last_path("runs/zLAST/x")


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return torch.rand(2).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)  # noqa: NPY002

    draw()  # leaves a half-used Gaussian pair in numpy and Python
    state = misc.capture_rng_state()
    first = draw()
    torch.save(state, tmp_path / "rng.pt")
    assert draw() != first
    misc.restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first


def test_single_process_helpers(monkeypatch):
    freed: list = []
    fake = SimpleNamespace(free_temporary_memory=lambda: freed.append(1))
    monkeypatch.setitem(sys.modules, "tinycudann", fake)
    misc.cleanup()
    assert freed == [1]
    tensor = torch.ones(2)
    misc.barrier()
    assert misc.broadcast(tensor) is tensor
    linear = torch.nn.Linear(1, 1)
    misc.enable_gradient(linear, False)
    assert not any(p.requires_grad for p in linear.parameters())
    assert misc.finish_with_cleanup(lambda x: x + 1)(1) == 2
