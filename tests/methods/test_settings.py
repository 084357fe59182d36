"""The library's own settings and schedules, against those of the host, which has the same rules."""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lods import schedules, settings
from lods.methods import registry
from lods.models.memory import ModelSettings
from lods.prompts import TextSettings
from omegaconf import OmegaConf

from threestudio.utils import ranges
from threestudio.utils.errors import UserError
from threestudio.utils.schedules import C

NAN, INF = math.nan, math.inf
CONFIGS = [registry.find(name).Config for name in registry.ours()] + [ModelSettings, TextSettings]
VALUES = [
    *(0, 1, -1, 2, 0.5, 0.02, -0.0, 1.0, 1e-300, 7.5, 100, 1000, 1001, 1e6, 1e9, 1e12, 2e12),
    *(INF, -INF, NAN, True, False, None, "", "0.5", "sds", "auto", "negative", "x"),
    *([], [0, 1], [0, 1, 9], [5, 0, 1, 9], [9, 0, 1, 5], [0, NAN, 1, 9], [0, 0, 1, INF], {}),
    *([0, 0.1, 0.2, 5, 0.3, 9], [0, True, 1, 9], ["a"], [0, 2, 0.5, 9], [-1, 0, 1, 9]),
]


def accepted(check, *args):
    try:
        check(*args)
    except (ValueError, TypeError) as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return False
    return True


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__qualname__)
def test_a_declared_field_takes_the_values_that_the_host_takes(config):
    for name, hint in settings.annotations(config).items():
        if settings.split(hint)[1]:
            for value in VALUES:
                ours = accepted(settings.check, name, value, hint)
                assert ours == accepted(ranges.checked, name, value, hint), (name, value)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__qualname__)
def test_annotations_are_those_that_the_host_sees(config):
    assert settings.annotations(config) == ranges.annotations(config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__qualname__)
def test_every_number_has_a_range_that_holds_its_default(config):
    made = settings.make(config, {})
    for field in dataclasses.fields(config):
        base, beside = settings.split(settings.annotations(config)[field.name])
        parts = {base, *typing.get_args(base)}
        assert beside or not parts & {int, float, Any}, field.name
        value = getattr(made, field.name)
        hint = settings.annotations(config)[field.name]
        assert settings.check(field.name, value, hint) == value


@dataclass
class Config:
    count: Annotated[int, "[1, 9]"] = 1
    share: Annotated[float, "(0, inf)"] = 0.5
    kind: Annotated[str, ("one", "two")] = "one"
    name: str | None = None
    on: bool = False

    def contradictions(self):
        if self.on and self.count > 5:
            yield "count", "must be at most 5 with on"


@dataclass
class Derived(Config):
    share: float = 2.0  # another default; the range is the base's

    def contradictions(self):
        if self.kind == "two" and not self.on:
            yield "kind", "=two needs on"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cuont": 1}, "there is no setting a.cuont (did you mean 'count'?)"),
        ({"zzz": 1}, "there is no setting a.zzz"),
        ({"count": 0}, "a.count must be a whole number in [1, 9], not 0"),
        ({"count": 1.5}, "a.count must be a whole number in [1, 9], not 1.5"),
        ({"count": None}, "a.count is empty: give it a value, or leave it out"),
        ({"share": INF}, "a.share must be a number in (0, inf), not .inf"),
        ({"share": NAN}, "a.share must be a number in (0, inf), not .nan"),
        ({"kind": "tow"}, "a.kind must be one of one, two, not 'tow' (did you mean 'two'?)"),
        ({"name": 3}, "a.name must be a text, not 3"),
        ({"on": 1}, "a.on must be true or false, not 1"),
        ({"count": 6, "on": True}, "a.count must be at most 5 with on"),
        ({"kind": "two"}, "a.kind=two needs on"),
        ({"count": "x" * 10_000}, "a.count must be a whole number in [1, 9], not 'xxx"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_field(values, said):
    with pytest.raises(ValueError) as caught:
        settings.make(Derived, values, "a.")
    assert str(caught.value).startswith(said) and len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_good_values_are_taken():
    made = settings.make(Derived, {"count": 3.0, "kind": "two", "on": True, "name": None})
    assert made == Derived(3, 2.0, "two", None, True) and isinstance(made.count, int)


def test_a_range_that_cannot_be_read_is_no_silent_one():
    with pytest.raises(TypeError, match="is no range such as"):
        settings.check("k", 1, Annotated[float, "0 to 1"])


# --- schedules ------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-100, 100), st.floats(-1e3, 1e3))
clocks = st.one_of(
    st.lists(st.integers(0, 50), min_size=2, max_size=5).map(sorted),
    st.lists(st.floats(0, 50), min_size=2, max_size=5).map(sorted),
)


@st.composite
def lists(draw):
    first, *steps = draw(clocks)
    values = [draw(numbers) for _ in range(len(steps) + 1)]
    items = [first, values[0]]
    for value, step in zip(values[1:], steps):
        items += [value, step]
    return items[1:] if len(items) == 4 and draw(st.booleans()) else items


@given(lists(), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_a_schedule_has_the_values_of_the_hosts(schedule, step, epoch, wrapped):
    value = OmegaConf.create(schedule) if wrapped else schedule
    assert schedules.value_at(value, step, epoch) == C(value, epoch, step)


@given(lists(), st.integers(0, 60))
def test_a_schedule_stays_between_its_values(schedule, step):
    values = [value for _, value in schedules.knots(schedule)]
    slack = 1e-9 * max(map(abs, values), default=0)
    assert min(values) - slack <= schedules.value_at(schedule, step, step) <= max(values) + slack


@given(lists())
def test_a_schedule_goes_through_its_knots(schedule):
    found = schedules.knots(schedule)
    for number, (step, value) in enumerate(found):
        last = all(other != step for other, _ in found[number + 1 :])
        if last:
            assert schedules.value_at(schedule, step, step) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("value", [[], [1], [0, 1], [0, 1, 2, 3, 4], [0, "a", 1, 2], [0, True, 1]])
def test_a_list_of_another_form_is_refused_by_both(value):
    for call in (lambda: schedules.value_at(value, 0), lambda: C(value, 0, 0)):
        with pytest.raises(ValueError, match="the schedule") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["0.5", None, {}])
def test_what_is_no_schedule_is_refused_by_both(value):
    with pytest.raises(TypeError, match="must be a number or a list of numbers"):
        schedules.value_at(value, 0)
    with pytest.raises(UserError):
        C(value, 0, 0)
