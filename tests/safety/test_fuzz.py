"""Random input within a budget: it is read, or refused in one line."""

import importlib
import io
import os
import string
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from tests.runs import ROOT
from threestudio.models.prompt_processors.base import PromptProcessor
from threestudio.models.prompt_processors.cache import hash_prompt
from threestudio.models.prompt_processors.dummy_prompt_processor import DummyPromptProcessor
from threestudio.run.checkpoint import AtomicCheckpointIO
from threestudio.run.messages import explain_error
from threestudio.utils.config import (
    ExperimentConfig,
    dump_config,
    load_config,
    parse_structured,
    safe_name,
)
from threestudio.utils.errors import UserError
from threestudio.utils.misc import C, load_module_weights
from threestudio.utils.typing import *


def budget(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,  # yet hypothesis draws constants of the modules imported so far
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def explained(error: Exception) -> None:
    """launch.py has one line for this error, which can be printed."""
    line = explain_error(error, ROOT)
    assert line and "\n" not in line and len(line) < 1500, repr(error)
    line.encode()


# --- configs ---

BASE = """
name: lab
tag: "${rmspace:${system.prompt_processor.prompt},_}"
data: {width: 64, list: [1, 2]}
system:
  prompt_processor: {prompt: a car}
  optimizer: {params: {geometry.means: {lr: 1}, geometry: {lr: 2}}}
trainer: {max_steps: 20}
checkpoint: {every_n_train_steps: '${trainer.max_steps}'}
"""
NAMES = [f for f in ExperimentConfig.__dataclass_fields__] + [
    *("data.width", "data.list", "data.list.0", "data.list[1]", "data.list[7]"),
    *("trainer.max_steps", "system.prompt_processor.prompt", "system.prompt_processor"),
    "system.optimizer.params",
    *("system.optimizer.params.geometry.means", "system.optimizer.params.geometry.means.lr"),
    *("system.optimizer.params.geometry", "checkpoint.dirpath", "checkpoint.filename"),
]
SYMBOLS = st.text(alphabet="ab.[]{}$:'\"\\!&*?|>-_%@#,=~ \n0", max_size=12)
KEYS = st.one_of(
    st.sampled_from(NAMES),
    st.builds("{}.{}".format, st.sampled_from(NAMES), SYMBOLS),
    SYMBOLS,
)
FRAGMENTS = st.sampled_from(
    [
        *(
            "${",
            "}",
            "${data.width}",
            "${.x}",
            "${..x}",
            "${oc.env:HOME}",
            "${oc.decode:",
            "${add:1,",
        ),
        *(
            "${mul:",
            "${tuple2:",
            "${cmaxgt0:[1,2]}",
            "${basename:",
            "${calc_exp_lr_decay_rate:0.1,0}",
        ),
        *(
            "${div:1,0}",
            "${oc.create:{a: 1}}",
            "${oc.select:x,3}",
            "${oc.dict.keys:data}",
            "???",
            "null",
        ),
        *(
            "[",
            "]",
            "{",
            "}",
            ": ",
            ", ",
            "- ",
            "&a ",
            "*a",
            "<<: ",
            "!!python/name:os.system",
            "!!set ",
            "~",
        ),
        *(
            "!!binary aGk=",
            "!!timestamp 2001-01-01",
            "2001-01-01",
            "1e9999",
            ".nan",
            "0x1f",
            "1:30",
            "'",
        ),
        *(
            '"',
            "\\",
            "\n",
            "\t",
            "#",
            "1",
            "-1",
            "true",
            "a",
            " ",
            "é",
            "\x00",
            "\x85",
            "\ufeff",
            "%",
        ),
    ]
)
VALUES = st.one_of(
    st.lists(FRAGMENTS, max_size=6).map("".join),
    st.text(max_size=12),
    SYMBOLS,
)


@budget(150)
@given(st.lists(st.tuples(KEYS, VALUES), max_size=4))
@example([("data.list.0", "1")])
@example([("system", "3"), ("system.x", "1")])
@example([("checkpoint", "[1]")])
@example([("exp_root_dir", "null")])
@example([("n_gpus", "many")])
def test_overrides(pairs):
    try:
        cfg = load_config(BASE, from_string=True, cli_args=[f"{k}={v}" for k, v in pairs])
    except Exception as error:
        explained(error)
        return
    root = os.path.realpath(str(cfg.exp_root_dir))
    assert os.path.commonpath([root, os.path.realpath(cfg.trial_dir)]) == root
    assert os.path.realpath(cfg.trial_dir) != root


@budget(500)
@given(st.lists(st.one_of(FRAGMENTS, KEYS, st.just(": "), st.just("\n")), max_size=12).map("".join))
def test_yaml(text):
    try:
        cfg = load_config(text, from_string=True)
    except Exception as error:
        explained(error)
        return
    assert isinstance(cfg, DictConfig)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False),
    st.text(max_size=8),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(alphabet="abc.", min_size=1, max_size=3), inner, max_size=3),
    ),
    max_leaves=6,
)


@budget(50)
@given(st.dictionaries(st.text(alphabet="xyz-", min_size=1, max_size=4), TREES, max_size=3))
def test_a_config_survives_a_file(tree):
    """What parsed.yaml holds is what was loaded, for every tree of plain values."""
    assume("${" not in repr(tree) and "???" not in repr(tree))
    try:
        repr(tree).encode()
    except UnicodeEncodeError:
        assume(False)
    cfg = load_config("tag: t", from_string=True, data=tree)
    file = Path("parsed.yaml")
    dump_config(file, cfg)
    again = load_config(str(file))
    left, right = (repr(OmegaConf.to_container(c)) for c in (cfg, again))
    assert left == right


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # collecting all garbage after each of hundreds of prompts takes minutes
    monkeypatch.setattr("threestudio.models.prompt_processors.base.cleanup", lambda: None)


@dataclass
class Fields:
    percent: float = 0.5
    threshold: Union[float, str] = 0.0
    scale: Optional[float] = None
    pair: Tuple[float, float] = (1.0, 2.0)
    steps: int = 3
    flag: bool = False
    label: str = ""
    anything: Any = None
    several: List[int] = field(default_factory=list)
    free: dict = field(default_factory=dict)


@budget(300)
@example({"steps": {}}, True)
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from(sorted(Fields.__dataclass_fields__)), st.text(max_size=4), LEAVES
        ),
        TREES,
        max_size=3,
    ),
    st.booleans(),
)
def test_parse_structured(values, wrap):
    try:
        cfg = parse_structured(Fields, OmegaConf.create(values) if wrap else values)
    except Exception as error:
        explained(error)
        return
    assert set(cfg) == set(Fields.__dataclass_fields__)
    for name in set(values) - {"scale", "threshold"}:
        given_, kept = values[name], cfg._get_node(name)._value()
        if name == "steps" and not isinstance(given_, (str, list)):
            assert isinstance(kept, int)
        if name == "label" and isinstance(given_, str):
            assert kept == given_


# --- prompts ---

NASTY = st.text(
    alphabet=st.one_of(
        st.sampled_from('./\\~:*?"<>|\x00\n\r\t \u202e\u2028\ud800\x85$`-'),
        st.characters(),
    ),
    max_size=300,
)


@budget(300)
@given(NASTY, NASTY)
@example("con.txt", "CON")
@example("a" * 119 + "é", "a" * 119 + "è")
def test_names_of_folders(one, two):
    name = safe_name(one)
    assert safe_name(name) == name, "a relaunch finds its folder"
    assert len(name.encode()) <= 120 and not set(name) & set('/\\:*?"<>|\x00\n')
    assert not name or (name[0] != "." and name[-1] not in ". ")
    assert os.path.normpath(os.path.join("root", "x" + name)) == f"root/x{name}"
    try:
        cfg = ExperimentConfig(name=one, tag=two, timestamp="", exp_root_dir="root")
    except UserError as error:
        explained(error)
        assert safe_name(two) == ""
        return
    trial = os.path.normpath(cfg.trial_dir)
    assert trial.startswith("root/") and os.path.realpath(trial).startswith(
        os.path.realpath("root")
    )
    os.makedirs(trial, exist_ok=True)


@budget(300)
@given(NASTY, NASTY)
@example("lib:", "")
@example("lib:../../etc_passwd", "lib:x")
def test_prompts(prompt, back):
    class Text(DummyPromptProcessor):
        preprocess_prompt = PromptProcessor.preprocess_prompt

    try:
        processor = Text({"prompt": prompt, "prompt_back": back})
    except Exception as error:
        explained(error)
        return
    assert processor.prompt == prompt
    views = dict(zip(processor.direction2idx, processor().prompts_vd))
    assert views["front"] == f"{prompt}, front view"
    assert views["back"] == (back or f"{prompt}, back view")
    assert not os.listdir(".")


PIECES = st.text(alphabet="01:ab", max_size=5)


@budget(300)
@given(PIECES, PIECES, PIECES, PIECES)
@example("a", "b", "", "ab")
@example("1:a", "b", "1", ":ab")
def test_cache_keys_are_injective(model, text, other_model, other_text):
    same = (model, text) == (other_model, other_text)
    key = hash_prompt(model, text)
    assert (key == hash_prompt(other_model, other_text)) == same
    assert set(key) <= set(string.hexdigits) and len(key) == 40


# --- schedules ---


@st.composite
def schedules(draw):
    """``[s0, v0, v1, s1, v2, s2, ...]`` with increasing steps, and its knots."""
    n = draw(st.integers(2, 6))
    steps = draw(st.lists(st.integers(0, 1000), min_size=n, max_size=n, unique=True).map(sorted))
    values = draw(st.lists(st.floats(-1e6, 1e6), min_size=n, max_size=n))
    flat = [steps[0], values[0]]
    for step, value in zip(steps[1:], values[1:]):
        flat += [value, step]
    return flat, steps, values


@budget(300)
@given(schedules(), st.integers(0, 1200), st.integers(0, 1200), st.booleans())
def test_schedules_are_piecewise_linear(schedule, step, epoch, epochs):
    flat, steps, values = schedule
    if epochs:
        flat = [*flat[:-1], float(flat[-1])]
    expected = np.interp(epoch if epochs else step, steps, values)
    assert C(flat, epoch, step) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert C(OmegaConf.create(flat), epoch, step) == C(flat, epoch, step)
    if steps[0] == 0 and len(steps) == 2:
        assert C(flat[1:], epoch, step) == C(flat, epoch, step)


ITEMS = st.one_of(
    st.integers(-5, 5), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3)
)


@budget(500)
@given(
    st.one_of(
        st.lists(ITEMS, max_size=9), ITEMS, st.lists(st.lists(ITEMS, max_size=2), max_size=4)
    ),
    st.integers(-3, 10),
    st.sampled_from(["linear", "exp"]),
)
@example([0, 1e-300, 1e300, 10], 5, "exp")
@example([0, 1, 2, 10**400], 5, "linear")
@example([float("nan"), 1, 2, float("nan")], 5, "linear")
def test_schedules_that_are_none(value, step, interpolation):
    try:
        result = C(value, 0, step, interpolation)
    except (ValueError, TypeError) as error:
        explained(UserError(str(error)))
        return
    assert isinstance(result, (int, float))


# --- files ---


@st.composite
def mutations(draw, size):
    """A function that damages `size` bytes in a few places."""
    edits = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["set", "cut", "insert", "repeat", "digit"]),
                st.one_of(st.integers(0, size), st.integers(0, min(size, 400))),
                st.binary(min_size=1, max_size=8),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def apply(data: bytes) -> bytes:
        for kind, at, new in edits:
            if kind == "set":
                data = data[:at] + new + data[at + len(new) :]
            elif kind == "cut":
                data = data[:at] + data[at + 16 * len(new) :]
            elif kind == "insert":
                data = data[:at] + new + data[at:]
            elif kind == "repeat":
                data = data[:at] + data[at : at + 40] * len(new) + data[at:]
            else:  # numbers of a header
                digit = str(new[0] % 10).encode()
                data = data[:at] + (digit if data[at : at + 1].isdigit() else b"") + data[at:]
        return data

    return apply


def valid_plys(ply):
    """Files of every kind that is read: Gaussians, points and a mesh, binary and in text."""
    import trimesh

    g = torch.Generator().manual_seed(0)
    shapes = {"means": (6, 3), "scales": (6, 3), "quats": (6, 4), "opacities": (6,)}
    shapes |= {"sh0": (6, 1, 3), "shN": (6, 3, 3)}
    ply.write_ply("g.ply", **{k: torch.randn(s, generator=g) for k, s in shapes.items()})
    ply.write_points("p.ply", torch.randn(6, 3, generator=g), torch.rand(6, 3, generator=g))
    box = trimesh.creation.box()
    box.export("m.ply")
    Path("a.ply").write_bytes(box.export(file_type="ply", encoding="ascii"))
    return [Path(f"{name}.ply").read_bytes() for name in "gpma"]


@pytest.mark.parametrize("kind", range(4))
def test_plys(lods, kind):
    ply = importlib.import_module("lods.gaussians.ply")
    initialize = importlib.import_module("lods.gaussians.initialize")
    valid = valid_plys(ply)[kind]
    read = 0

    @budget(150)
    @given(mutations(len(valid)))
    def check(mutate):
        nonlocal read
        path = Path("damaged.ply")
        path.write_bytes(mutate(valid))
        try:
            content = initialize.FileInit(str(path), n_points=20).load(np.random.default_rng(0))
            if isinstance(content, initialize.Points):
                assert content.xyz.shape == content.rgb.shape
                content = initialize.from_points(content, 0.1, 1.0, 0)
        except ValueError as error:
            explained(error)
            return
        read += 1
        assert all(value.isfinite().all() for value in content.values())
        assert len(content["means"]) >= 4 or kind == 0

    check()
    assert read > 5, "nearly nothing was read: the mutations are too strong to find anything"


def test_checkpoints(tmp_path):
    state = {"geometry.means": torch.randn(50, 3), "geometry.counts": torch.arange(50)}
    io_ = AtomicCheckpointIO()
    io_.save_checkpoint({"state_dict": state, "epoch": 1, "global_step": 7}, "a.ckpt")
    valid = Path("a.ckpt").read_bytes()
    refused = 0

    @budget(300)
    @given(mutations(len(valid)))
    def check(mutate):
        nonlocal refused
        Path("b.ckpt").write_bytes(mutate(valid))
        try:
            loaded, epoch, step = load_module_weights("b.ckpt", module_name="geometry")
        except UserError as error:
            explained(error)
            refused += 1
            return
        assert isinstance(epoch, int) and isinstance(step, int)
        assert all(isinstance(v, torch.Tensor) for v in loaded.values())

    check()
    assert 100 < refused < 300


@budget(300)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_checkpoint(data):
    for content in (data, torch_file({"state_dict": data, "epoch": 0, "global_step": 0})):
        Path("c.ckpt").write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_module_weights("c.ckpt")
        explained(caught.value)


def torch_file(content) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()
