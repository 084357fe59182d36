"""The ranges that config fields declare: how they are written, and that no field lacks one."""

import dataclasses
import importlib
import inspect
import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, TypedDict

import pytest
import torch
from omegaconf import OmegaConf

import threestudio
from threestudio.systems.optimizer_options import Rates, ScheduleArguments
from threestudio.utils.config import ExperimentConfig, parse_structured
from threestudio.utils.errors import UserError
from threestudio.utils.ranges import TEXTS, Range, annotations, checked, split
from threestudio.utils.trainer_options import CheckpointOptions, TrainerOptions
from threestudio.utils.typing import *

NAN, INF = math.nan, math.inf

# --- how a range is written ---


@pytest.mark.parametrize(
    ("text", "base", "good", "bad"),
    [
        ("[0, 1]", float, [0, 1, 0.5], [-1e-9, 1.001, NAN, INF, True, "0.5", [0.5], {}]),
        ("(0, 180)", float, [1e-300, 179.9], [0, 180, -0.0]),
        ("(0, inf)", float, [1e308], [INF, 0]),
        ("(0, inf]", float, [INF, 5], [NAN, -INF, 0]),
        ("(-inf, inf)", float, [-1e308, 0], [NAN, INF, -INF]),
        ("[1, 64]", int, [1, 64], [0, 65, 1.5, 10**400, NAN, INF, "7"]),
        ("[1, 64]", Optional[int], [1, None], [0, 1.5]),
        ("[1, 64]", List[int], [[], [1], [64, 1]], [3, [0], [1.0], [True], ["1"]]),
        ("[0, 1]", Tuple[float, float], [[0, 1], (1, 0)], [[0], [0, 0, 0], 0.5, [0, NAN]]),
        ("ordered (0, 9]", Tuple[float, float], [[1, 9], [2, 2]], [[2, 1], [0, 1], [1, 2, 3]]),
        ("whole each [1, 9]", Any, [1, [1, 9]], [None, 0, [], [1, 10], 1.5, [1.5], "1"]),
        ("each [1, 9]", Optional[Any], [1.5, None, [1, 9]], [0, [0]]),
        ("list [0, 1]", Any, [[0], [1, 0]], [0.5, [], [2], "white"]),
        ("[0, 1] or auto", Any, ["auto", 0], ["car", 2]),
        (
            "scheduled [0, 1]",
            Any,
            [0.5, [0, 1, 9], [5, 0, 1, 9], [0, 0, 1, 5, 0, 9], [5, 1, 0, 5]],
            [2, [], [0, 1], [0, 2, 9], [9, 0, 1, 5], [-1, 0, 1, 5], [0, NAN, 1, 9], [0, 0, 1, INF]],
        ),
    ],
)
def test_what_is_in_a_range(text, base, good, bad):
    hint = Annotated[base, text]
    for value in good:
        assert checked("key", value, hint) == value
        if isinstance(value, list):
            assert list(checked("key", OmegaConf.create(value), hint)) == value
    for value in bad:
        with pytest.raises(UserError) as caught:
            checked("a.key", value, hint)
        assert str(caught.value).startswith("a.key") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "base", "value", "message"),
    [
        ("(0, 180)", float, 180.0, "k must be a number above 0 and below 180, not 180"),
        ("[1, 1e12]", int, 0, "k must be a whole number from 1 to 1e+12, not 0"),
        ("(0, inf)", float, INF, "k must be a finite number above 0, not .inf"),
        ("(0, inf]", float, NAN, "k must be a number above 0 (.inf is allowed), not .nan"),
        (
            "[0, 1] or auto",
            Any,
            "auo",
            "k must be a number from 0 to 1 or auto, not 'auo': did",
        ),
        (
            "ordered [0, 1]",
            Tuple[float, float],
            [1, 0],
            "k must be 2 numbers [low, high] with low <= high, each from 0 to 1, not [1, 0]",
        ),
        ("scheduled [0, 1]", Any, 3, "k must be a number from 0 to 1, or a schedule of such n"),
    ],
)
def test_a_message_says_what_is_allowed(text, base, value, message):
    with pytest.raises(UserError) as caught:
        checked("k", value, Annotated[base, text])
    assert str(caught.value).startswith(message)


def test_a_long_value_is_cut():
    for value in ("x" * 10000, 10**5000, [[1] * 1000] * 1000):
        with pytest.raises(UserError) as caught:
            checked("k", value, Annotated[Any, "[0, 1]"])
        assert len(str(caught.value)) < 200


def test_a_mistake_in_a_declaration_is_no_silent_one():
    for text in ("0..1", "[1, 0]", "some [0, 1]", "[0,1]", ">0"):
        with pytest.raises(ValueError, match="range"):
            Range.parse(text)


class Inner(TypedDict, total=False):
    n: Annotated[int, "[1, 9]"]
    kind: Annotated[str, ("a", "b")]
    on: bool


@dataclass
class Base:
    near: Annotated[float, "(0, 9]"] = 1.0
    far: Annotated[float, "(0, 99]"] = 2.0
    free: float = 1.0
    inner: Annotated[dict, Inner] = field(default_factory=dict)
    each: Annotated[dict, Dict[str, Annotated[float, "[0, 1]"]]] = field(default_factory=dict)
    scale: Annotated[Any, "[0, 1]"] = 0

    def contradictions(self):
        if self.near >= self.far:
            yield "far", f"must be above near={self.near:g}"


@dataclass
class Derived(Base):
    near: float = 5.0
    far: float = 7.0
    scale: float = 3.0  # another type: whatever it declares itself
    more: Annotated[dict, Base] = field(default_factory=dict)

    def contradictions(self):
        if self.free == 7:
            yield "free", "=7 is odd"


def refused(cls, values):
    with pytest.raises(UserError) as caught:
        parse_structured(cls, OmegaConf.create({"sys": values}).sys)
    return str(caught.value)


def test_fields_are_checked_with_their_full_keys_whatever_the_depth():
    assert refused(Base, {"near": 0}) == "sys.near must be a number above 0 and at most 9, not 0"
    assert refused(Base, {"inner": {"n": 10}}).startswith("sys.inner.n must be a whole number from")
    assert refused(Base, {"inner": {"kind": "c"}}).startswith("sys.inner.kind must be one of a, b")
    assert refused(Base, {"inner": {"on": "perhaps"}}).startswith("sys.inner.on must be true or fa")
    assert refused(Base, {"each": {"x": 2}}).startswith("sys.each.x must be a number from 0 to 1")
    assert refused(Derived, {"more": {"inner": {"n": 0}}}).startswith("sys.more.inner.n must be")
    assert parse_structured(Base, {"inner": {"unknown": NAN}, "free": [1, 2]}).free == [1, 2]


def test_a_default_of_a_subclass_keeps_the_range_and_another_type_drops_it():
    assert refused(Derived, {"near": 10}).startswith("sys.near must be")
    assert parse_structured(Derived, {"scale": 2}).scale == 2


def test_contradictions_of_all_bases_count_with_defaults():
    assert refused(Base, {"near": 3}) == "sys.far must be above near=3"
    assert refused(Derived, {"near": 8}) == "sys.far must be above near=8"
    assert refused(Derived, {"free": 7}) == "sys.free=7 is odd"


def test_a_subclass_with_other_types_is_not_judged_by_its_bases():
    @dataclass
    class Scheduled(Base):
        near: Any = 1.0

    assert parse_structured(Scheduled, {"near": [0, 1.0, 2.0, 9]}).near == [0, 1.0, 2.0, 9]


def test_whole_numbers_may_be_written_with_an_exponent():
    cfg = parse_structured(Base, {"inner": {"n": 5.0}})
    assert cfg.inner.n == 5 and isinstance(cfg.inner.n, int)

    @dataclass
    class Count:
        n: int = 1

    assert isinstance(parse_structured(Count, OmegaConf.create("n: 1e3")).n, int)
    with pytest.raises(UserError, match="n"):
        parse_structured(Count, {"n": 1.5})


# --- that no field lacks one ---

OPEN = {  # mappings that are not read by the class itself, and why
    "loggers": "each logger's own",
    "loss": "a system's own; those of the extension have ranges",
    "geometry": "sections, each of the class in X_type",
    "geometry_convert_override": "of another class's section",
    "material": "a section",
    "background": "a section",
    "renderer": "a section",
    "guidance": "a section",
    "prompt_processor": "a section",
    "exporter": "a section",
    "data": "a section",
    "system": "a section",
    "proposal_network_config": "not implemented, and refused",
    "prop_optimizer_config": "not implemented, and refused",
    "prop_scheduler_config": "not implemented, and refused",
    "fmt": "words, or a list of them",
    "devices": "see contradictions in trainer_options",
    "precision": "words and numbers",
    "val_check_interval": "see contradictions in trainer_options",
}


def config_classes():
    """Every dataclass and TypedDict that a config is checked against."""
    found = {ExperimentConfig: None}
    for cls in threestudio.__modules__.values():
        if inspect.isclass(config := getattr(cls, "Config", None)):
            found[config] = None
    # tests register classes, too
    found = {c: None for c in found if c.__module__.startswith(("threestudio.", "lods."))}
    waiting = list(found)
    while waiting:
        for hint in annotations(waiting.pop()).values():
            for part in parts_of(hint):
                declared = inspect.isclass(part) and (
                    dataclasses.is_dataclass(part) or typing.is_typeddict(part)
                )
                if declared and part not in found:
                    found[part] = None
                    waiting.append(part)
    return list(found)


def parts_of(hint):
    """The annotation, what stands beside it, and the parts of both."""
    base, beside = split(hint)
    yield base
    for part in (*typing.get_args(base), *beside):
        if not isinstance(part, (str, tuple)):
            yield from parts_of(part)


def is_numeric(hint):
    base = split(hint)[0]
    return any(part in (int, float, Any, dict) for part in parts_of(base))


def test_every_field_that_can_hold_a_number_declares_a_range(lods):
    classes = config_classes()
    assert len(classes) > 45
    lacking = [
        f"{cls.__module__}.{cls.__qualname__}.{name}"
        for cls in classes
        for name, hint in annotations(cls).items()
        if is_numeric(hint)
        and not split(hint)[1]
        and name not in OPEN
        and not (typing.get_origin(split(hint)[0]) is dict or is_nested(hint))
    ]
    assert not lacking, lacking


def is_nested(hint):
    return any(typing.is_typeddict(part) for part in parts_of(hint))


def test_every_declaration_can_be_read(lods):
    for cls in config_classes():
        for hint in annotations(cls).values():
            for declared in split(hint)[1]:
                if isinstance(declared, str) and declared != TEXTS:
                    Range.parse(declared)


def test_the_defaults_are_within_the_ranges(lods):
    for cls in config_classes():
        if not dataclasses.is_dataclass(cls):
            continue
        cfg = parse_structured(cls, {"tag": "t"} if cls is ExperimentConfig else {})
        for name, hint in annotations(cls).items():
            if split(hint)[1]:
                checked(name, cfg[name], hint)


def numbers_of(function, optional=True):
    """Names of the arguments whose annotation or default is a number, or a list of them."""
    names = set()
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        values = default if isinstance(default, tuple) else (default,)
        numeric = any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        kinds = {part for part in parts_of(parameter.annotation) if part in (int, float)}
        if numeric or kinds:
            names.add(name)
    return names


def test_the_options_of_libraries_are_covered(lods):
    """Lightning's, torch's and gsplat's numbers, by their own signatures."""
    import pytorch_lightning as pl
    from torch.optim import lr_scheduler

    gaussian = importlib.import_module("lods.gaussians.strategies")
    strategies = importlib.import_module("lods.threestudio.systems.strategy_options")
    optimizers = [c for c in vars(torch.optim).values() if inspect.isclass(c)]
    optimizers.append(threestudio.systems.optimizers.Adan)
    schedulers = [c for c in vars(lr_scheduler).values() if inspect.isclass(c)]
    schedulers = [c for c in schedulers if issubclass(c, lr_scheduler.LRScheduler)]
    elsewhere = {"max_time", "fast_dev_run", "self", "optimizer"}  # see contradictions
    for options, functions in (
        (TrainerOptions, [pl.Trainer.__init__]),
        (CheckpointOptions, [pl.callbacks.ModelCheckpoint.__init__]),
        (Rates, [c.__init__ for c in optimizers]),
        (ScheduleArguments, [c.__init__ for c in schedulers]),
        (strategies.DefaultOptions, [gaussian.default_strategy().__init__]),
        (strategies.McmcOptions, [gaussian.mcmc_strategy().__init__]),
    ):
        wanted = set().union(*(numbers_of(f) for f in functions)) - elsewhere
        assert len(wanted) >= 3 and wanted <= set(annotations(options)), options
