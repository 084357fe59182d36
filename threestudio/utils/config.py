"""Experiment configs: YAML files, command-line overrides, resolvers and structured parsing."""

import dataclasses
import hashlib
import io
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Optional, Union
from unicodedata import category

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

import threestudio
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.hints import (
    INTERPOLATION,
    full_key,
    is_text,
    misspelt,
    quoted,
    unquoted,
    walk,
)
from threestudio.utils.layers import refuse_empty_sections, refuse_other_kinds
from threestudio.utils.ranges import annotations as declared_annotations
from threestudio.utils.ranges import (
    are_texts,
    checked,
    is_list,
    may_be_null,
    not_a_number,
    refuse_contradictions,
    shown,
    takes_mapping,
    takes_texts,
)
from threestudio.utils.safe_yaml import bounded_interpolation, check_yaml, read_limited
from threestudio.utils.schedules import schedule_knots
from threestudio.utils.trainer_options import CheckpointOptions, TrainerOptions, contradictions
from threestudio.utils.typed_sections import merge_layers

# --- resolvers ----------------------------------------------------------------------------------


def C_max(value) -> float:
    """The largest value that a scheduled value (see :func:`threestudio.utils.misc.C`) takes."""
    if isinstance(value, (int, float)):
        return value
    return max(knot_value for _, knot_value in schedule_knots(value))


def _multiply(a, b):
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a * b
    raise TypeError(f"mul takes two numbers, not {a!r} and {b!r}")  # a text would be repeated


_RESOLVERS = {
    "calc_exp_lr_decay_rate": lambda factor, n: factor ** (1.0 / n),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": _multiply,
    "div": lambda a, b: a / b,
    "idiv": lambda a, b: a // b,
    "basename": lambda path: os.path.basename(path),
    "rmspace": lambda s, sub: str(s).replace(" ", sub),
    "tuple2": lambda x: [float(x), float(x)],
    "gt0": lambda x: x > 0,
    "not": lambda x: not x,
    "cmaxgt0": lambda v: C_max(v) > 0,
    "cmaxgt0orcmaxgt0": lambda a, b: C_max(a) > 0 or C_max(b) > 0,
}
with warnings.catch_warnings():
    # omegaconf 2.4 renames this method, but 2.3's method of the new name means something else
    warnings.simplefilter("ignore")
    for _name, _resolver in _RESOLVERS.items():
        # replace: a second import (or another copy of this API in the process) is no error
        OmegaConf.register_new_resolver(_name, _resolver, replace=True)


# --- the experiment -----------------------------------------------------------------------------

_MAX_NAME_BYTES = 120  # file systems allow 255; the timestamp and suffixes come on top


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # by Windows


def safe_name(text: str) -> str:
    """`text` as the name of one folder on any system: no separators, nothing invisible, no dots at
    its ends, no name that Windows keeps for devices, at most 120 bytes of UTF-8. A text that is
    cut gets eight digits of its hash, so that two stay apart."""
    name = re.sub(r"[/\\:*?\"<>|]", "_", str(text)).strip()
    # controls, directions of writing, halves of characters (what Unicode calls C*, Zl and Zp)
    name = "".join("_" if category(c)[0] == "C" or category(c) in ("Zl", "Zp") else c for c in name)
    name = re.sub(r"^\.+|\.+$", lambda dots: "_" * len(dots[0]), name)
    if _RESERVED.match(name):
        name = "_" + name
    if len(name.encode()) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(str(text).encode(errors="surrogatepass")).hexdigest()[:8]
        name = name.encode()[: _MAX_NAME_BYTES - 9].decode(errors="ignore") + "-" + digest
    return name


def _refuse_outside(checkpoint: dict, root: str) -> None:
    """Checkpoints too stay in the folder that the user has named."""
    if not isinstance(checkpoint, Mapping):
        return  # the types of all fields are checked later
    folder = checkpoint.get("dirpath")
    if folder is not None:
        inside, path = os.path.realpath(root), os.path.realpath(str(folder))
        if os.path.commonpath([inside, path]) != inside:
            raise UserError(
                f"checkpoint.dirpath={folder} is outside of exp_root_dir={root}: leave it out, or "
                "set exp_root_dir"
            )
    name = checkpoint.get("filename") or ""
    if not isinstance(name, str):
        raise UserError(f"checkpoint.filename must be a text, not {shown(name)}")
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise UserError(f"checkpoint.filename={name!r} leads out of the folder of the checkpoints")
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", name)):
        raise UserError(f"checkpoint.filename={name!r} has a brace without its other one")


@dataclass
class ExperimentConfig:
    """One run. `exp_dir`, `trial_name`, `trial_dir` and `n_gpus` are derived, not set.

    The results go to ``exp_root_dir/name/tag@timestamp``. `name` and `tag` may come from a prompt:
    they are made safe (see :func:`safe_name`; a `name` may hold "/" to make subfolders) and never
    lead out of `exp_root_dir`, wherever they were given; nor may ``checkpoint.dirpath`` and
    ``checkpoint.filename``. `exp_root_dir` itself is taken as it is: it is the one value that says
    where to write. Nothing is created on disk here.
    """

    name: str = "default"
    description: str = ""
    tag: str = ""
    seed: Annotated[int, "[0, 4294967295]"] = 0  # 32 bits, as numpy takes them
    use_timestamp: bool = True
    # set in a saved config, so that a relaunch finds its folder; Optional, here and below, is what
    # _takes_one_value looks for
    timestamp: Optional[str] = None  # noqa: UP045
    exp_root_dir: str = "outputs"

    exp_dir: str = ""
    trial_name: str = ""
    trial_dir: str = ""
    n_gpus: Annotated[int, "[0, 100000]"] = 1

    resume: Optional[str] = None  # noqa: UP045
    report: bool = True  # report.html, a page of the run, in its folder at its end

    data_type: str = ""
    data: dict = field(default_factory=dict)

    system_type: str = ""
    system: dict = field(default_factory=dict)

    # arguments of Lightning's Trainer and ModelCheckpoint
    trainer: Annotated[dict, TrainerOptions] = field(default_factory=dict)
    checkpoint: Annotated[dict, CheckpointOptions] = field(default_factory=dict)

    def __post_init__(self):
        if not self.tag and not self.use_timestamp:
            raise UserError("tag is empty and use_timestamp is false: set one, to name the run")
        if self.timestamp is None:
            self.timestamp = ""
            if self.use_timestamp and self._several_processes():
                threestudio.warn("with several processes no timestamp is added to the run's folder")
            elif self.use_timestamp:
                self.timestamp = datetime.now().strftime("@%Y%m%d-%H%M%S")
        parts = [safe_name(part) for part in str(self.name).split("/") if part] or ["default"]
        self.trial_name = safe_name(self.tag) + safe_name(self.timestamp)
        if not self.trial_name:
            raise UserError(f"tag={self.tag!r} leaves no name for the run's folder: set another")
        _refuse_outside(self.checkpoint, self.exp_root_dir)
        self.exp_dir = os.path.join(self.exp_root_dir, *parts)
        self.trial_dir = os.path.join(self.exp_dir, self.trial_name)

    def contradictions(self):
        """See :mod:`threestudio.utils.ranges`."""
        for name, text in contradictions(self.trainer):
            yield f"trainer.{name}", text

    def _several_processes(self) -> bool:
        """Each would take a time of its own. What is no number is refused later."""
        devices, nodes = (self.trainer.get(key) for key in ("devices", "num_nodes"))
        numbers = re.compile(r"-?\d{1,9}", re.ASCII)
        devices = int(devices) if numbers.fullmatch(str(devices)) else -1
        nodes = int(nodes) if numbers.fullmatch(str(nodes)) else 1
        if self.trainer.get("accelerator") != "cpu":  # there are no more of them than are visible
            visible = self.n_gpus if isinstance(self.n_gpus, int) else 1
            devices = visible if devices < 0 else min(devices, visible)
        return devices > 1 or nodes > 1


def _load_yaml(text_or_path: str, from_string: bool) -> DictConfig:
    where = "the config" if from_string else text_or_path
    try:
        text = text_or_path if from_string else read_limited(text_or_path)
        check_yaml(text, where)
        # not create(text), for which a file of one word is a key
        conf = OmegaConf.load(io.StringIO(text))
    except UserError:
        raise
    except FileNotFoundError:
        folder = Path(text_or_path).parent
        there = [str(p) for p in folder.glob("*.yaml")] if folder.is_dir() else []
        hint = nearest(str(text_or_path), there)
        raise UserError(f"config file {text_or_path} not found{hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is not valid YAML: save it as text in UTF-8") from None
    except OSError as error:
        if error.strerror is None:  # OmegaConf's, of a single value
            raise UserError(f"{where} is not a YAML mapping") from None
        raise UserError(f"config file {where} cannot be read: {error.strerror}") from None
    except GrammarParseError as error:
        key = re.search(r"full_key: (\S+)", str(error))
        raise UserError(f"{where}{f', {key[1]}' if key else ''}: {INTERPOLATION}") from None
    except Exception as error:  # YAML's own and OmegaConf's, and whatever its constructors raise
        raise UserError(f"{where} is not valid YAML: {_short(str(error))}") from None
    if not isinstance(conf, DictConfig):
        raise UserError(f"{where} is not a YAML mapping")
    return conf


def _split_key(key: str, base: Any) -> list[str]:
    """The keys that a dotted `key` goes through. Where `base` has keys with dots in them, such as
    the optimizer's ``geometry.means``, the longest that fits is one step."""
    parts, path = key.split("."), []
    while parts:
        names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        known = base if isinstance(base, DictConfig) else ()
        name = next((n for n in names if n in known), parts[0])
        base = base._get_node(name) if name in known else None
        path.append(name)
        parts = parts[name.count(".") + 1 :]
    return path


def _what_to_write(arg: str, following: list[str], base: Any, top_level: list[str]) -> str:
    """What is wrong with an option with dashes that is none, in one line."""
    name, equals, value = arg.lstrip("-").partition("=")
    key = name if "." in name else full_key(name, base, top_level)
    if not equals and following and "=" not in following[0] and following[0][:1] != "-":
        value = following[0]
    if not key:
        return f"unknown option {arg!r}: options of a config are written key=value"
    plain = re.fullmatch(r"[\w.,+-]+", value)
    write = repr(f"{key}={value}") if plain else f"{key}={quoted(value or '...')}"
    return f"unknown option {arg.partition('=')[0]!r}: write it without dashes, as {write}"


def _parse_value(arg: str, key: str, raw: str) -> Any:
    """The value that was typed as `raw`."""
    text = is_text(key)
    try:
        arg.encode()
        check_yaml(raw, f"the value of {key}")
        # OmegaConf's own reading, for its number formats (1e-3 is a float)
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={raw}"]))["x"]
    except UnicodeEncodeError:
        ascii_only = sys.getfilesystemencoding().lower() not in ("utf-8", "utf8")
        hint = ", which this locale is not made for: set PYTHONUTF8=1" * ascii_only
        raise UserError(f"cannot read {arg!r}: it is not text in UTF-8{hint}") from None
    except UserError:
        if not text:
            raise
        value = raw
    except Exception:  # not YAML, in one of many ways
        value = raw
    if value is None:  # what YAML makes of "", "&x" and "#x" too
        null = raw.strip().lower() in ("null", "~")
        return None if null and key.rpartition(".")[2] not in ("prompt", "name", "tag") else raw
    quotes = raw.lstrip().startswith(("'", '"'))
    if text or isinstance(value, str):
        return value if quotes and isinstance(value, str) else raw
    braced = raw.lstrip().startswith("{")
    return raw if isinstance(value, dict) and not braced else value


def parse_overrides(cli_args: Iterable[str], base: DictConfig | None = None) -> DictConfig:
    """``["a.b=1", ...]`` as a nested config. Values are read as YAML, except that a text stays the
    text that was typed (``prompt=a cat: asleep #1`` is one string). Keys of `base` that hold dots
    are recognised (``optimizer.params.geometry.means.lr=0.1``)."""
    conf = OmegaConf.create()
    args = list(cli_args)
    top_level = [f.name for f in dataclasses.fields(ExperimentConfig)]
    for i, arg in enumerate(args):
        key, equals, raw = arg.partition("=")
        if arg.startswith("-"):
            raise UserError(_what_to_write(arg, args[i + 1 : i + 2], base, top_level))
        if not equals or not key:
            is_key = "." in arg and arg in dict(walk(base or {}))
            write = "" if is_key else unquoted(args[:i], args[i:])
            hint = f"put the value in quotes: {write}" if write else "options of a config are "
            raise UserError(f"cannot read {arg!r}: {hint}" + "written key=value" * (not write))
        if not all(key.split(".")):
            raise UserError(f"cannot read {arg!r}: a part of the key {key!r} is empty")
        if "." not in key and key not in top_level and (meant := full_key(key, base)):
            raise UserError(f"the config has no field {key!r}: did you mean {meant!r}?")
        value = _parse_value(arg, key, raw)
        try:
            path = _split_key(key, base)
            if any("." in name for name in path):
                for name in reversed(path):
                    value = {name: value}
                conf = OmegaConf.merge(conf, value)
            else:
                OmegaConf.update(conf, key, value)
        except OmegaConfBaseException as error:
            problem = INTERPOLATION if "${" in raw else _first_line(error)
            raise UserError(f"cannot read {arg!r}: {problem}") from None
        except (IndexError, TypeError, ValueError, AttributeError):
            raise UserError(f"cannot read {arg!r}: {key!r} is not the key of a value") from None
    return conf


def _missing(conf, prefix: str = "") -> list[str]:
    """Full keys of all values that are literally ``???`` (an interpolation of one is not)."""
    found: list[str] = []
    for key in conf if isinstance(conf, DictConfig) else range(len(conf)):
        node = conf._get_node(key)
        full = f"{prefix}.{key}" if prefix else str(key)
        if node._value() == "???":
            found.append(full)
        elif OmegaConf.is_config(node) and not (node._is_none() or node._is_interpolation()):
            found += _missing(node, full)
    return found


def _complain_of_missing(conf: DictConfig) -> None:
    missing = _missing(conf)
    for key in missing:
        if meant := misspelt(key, conf):
            raise UserError(f"the config has no {meant!r}: did you mean {key!r}?")
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        example = " ".join(f'{key}="..."' for key in missing)
        raise UserError(f"{', '.join(missing)} {verb} missing: add {example}")


def _in_config(error: OmegaConfBaseException, conf: DictConfig | None) -> str:
    """One line for an error of OmegaConf in resolving `conf`: a reference that leads nowhere is
    looked for, because OmegaConf names the key that was read first, such as the run's tag."""
    lost = re.search(r"Interpolation key '([^']*)' not found", str(error))
    for key, value in walk(conf) if lost else ():
        if isinstance(value, str) and re.search(rf"\$\{{\s*{re.escape(lost[1])}\s*\}}", value):
            return f"config: there is no key {lost[1]!r} (asked for at {key}): {INTERPOLATION}"
    if value := re.search(r"node `(\S+)` is not a container", str(error)):
        return f"config: {value[1]} takes a mapping (asked for at {error.full_key})"
    where = f" (at {error.full_key})" if error.full_key else ""
    return f"config: {_first_line(error)}{where}"


def load_config(
    *yamls: str, cli_args: Iterable[str] = (), from_string: bool = False, **kwargs
) -> DictConfig:
    """Merge YAML files (or strings) from left to right, then the overrides `cli_args`
    (``"system.loss.lambda_sds=1"``), then `kwargs`; resolve everything; derive the folders.
    Settings of one type only (``guidance_for``) are put into their section, or left out: see
    :mod:`threestudio.utils.typed_sections`.

    Returns an OmegaConf config with the fields of :class:`ExperimentConfig`. Raises
    :class:`UserError` that names the key for a missing (``???``) value, an unknown key, an
    interpolation that leads nowhere or a value of the wrong type.

    No resolver runs code. OmegaConf's own ``${oc.env:NAME}`` reads environment variables, as its
    users expect: the saved ``parsed.yaml`` then holds their values, so look for it in a config
    from a stranger before you pass a run on.
    """
    conf = None
    try:
        with bounded_interpolation():
            layers = [_load_yaml(y, from_string) for y in yamls]
            refuse_other_kinds(layers)
            overrides = parse_overrides(cli_args, OmegaConf.merge(*layers))
            layers += [overrides, OmegaConf.create(dict(kwargs))]
            refuse_other_kinds(layers)
            conf = merge_layers(layers)
            refuse_empty_sections(conf)
            _complain_of_missing(conf)
            OmegaConf.resolve(conf)
            for key in not_a_number(conf):
                raise UserError(f"{key} is .nan, which no setting can mean: give it a number")
    except OmegaConfBaseException as error:
        raise UserError(_in_config(error, conf)) from None
    except UserError as error:  # OmegaConf adds lines to an error that passes through it
        raise UserError(_first_line(error)) from None
    except TypeError as error:
        raise UserError(f"config: {_first_line(error)}") from None
    except RecursionError:
        raise UserError("config: its interpolations go too deep, or in a circle") from None
    return parse_structured(ExperimentConfig, conf, where="the config")


def config_to_primitive(config, resolve: bool = True) -> Any:
    """The config as plain dicts, lists and scalars."""
    return OmegaConf.to_container(config, resolve=resolve)


def dump_config(path, config) -> None:
    """Write the config to a YAML file, all interpolations resolved."""
    with open(path, "w", encoding="utf-8") as stream:
        OmegaConf.save(config=config, f=stream, resolve=True)


# --- structured parsing -------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return _short((str(error).strip().splitlines() or [type(error).__name__])[0])


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 500 else text[:500] + "..."


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def _full_key(cfg, key) -> str:
    try:
        return cfg._get_full_key(key)
    except AttributeError:
        return str(key)


def _adapt(value, annotation):
    """Accept what a YAML author means: an int where ``Union[float, str]`` asks for a float, 1e4
    where a whole number is asked for, and a plain list (a schedule) where a YAML list is accepted
    already."""
    options = set(typing.get_args(annotation)) if typing.get_origin(annotation) is Union else set()
    if isinstance(value, int) and not isinstance(value, bool):
        if float in options and int not in options:
            return float(value)
    elif isinstance(value, float) and (options or {annotation}) <= {int, type(None)}:
        return int(value) if value.is_integer() else value
    elif isinstance(value, (list, tuple)) and (options or {annotation}) & {float, int}:
        return OmegaConf.create(list(value))
    return value


def _takes_one_value(annotation: Any) -> bool:
    return _options(annotation) <= {int, float, str, bool, type(None)}


def _takes_no_number(annotation: Any) -> bool:
    """Whether a field is of one text or switch, which has no schedules."""
    return _options(annotation) <= {str, bool, type(None)}


def _options(annotation: Any) -> set[Any]:
    """The types of ``Union[X, Y]`` or ``X | Y``; of anything else itself."""
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    return set(typing.get_args(annotation)) if union else {annotation}


def _read_value(cfg: Any, key: Any, full: str) -> Any:
    try:
        return cfg[key]
    except MissingMandatoryValue:
        raise UserError(f'{full} is missing: add {full}="..."') from None
    except OmegaConfBaseException as error:
        more = f"; {INTERPOLATION}" if "nterpolation" in str(error) else ""
        raise UserError(f"{full}: {_first_line(error)}{more}") from None


def _check_kind(key: str, value: Any, annotation: Any) -> None:
    """Before the dataclass sees a value: its ``__post_init__`` relies on its types."""
    if value is None and not may_be_null(annotation):
        raise UserError(f"{key} is empty: give it a value, or leave the key out")
    mapping = isinstance(value, Mapping | DictConfig)
    if takes_mapping(annotation) and not mapping and value is not None:
        raise UserError(f"{key} takes a mapping, not {shown(value)}")
    if takes_texts(annotation) and not are_texts(value):
        raise UserError(f"{key} takes a list of texts, not {shown(value)}")
    # a node of OmegaConf is not checked against the field: only schedules shall get through
    if mapping and _takes_one_value(annotation):
        raise UserError(f"{key} takes one value, not a mapping")
    if is_list(value) and _takes_no_number(annotation):
        raise UserError(f"{key} takes one value, not a list")


def unknown_field(where: str, key: Any, full_key: str, known: Iterable[str]) -> UserError:
    """What is said of a key that the dataclass `where`, with the fields `known`, does not have."""
    hint = nearest(key, known) or f"; its fields are {_listed(known)}"
    return UserError(f"{where} has no field {full_key!r}{hint}")


def parse_structured(fields, cfg=None, where: str = "", prefix: str = "") -> Any:
    """Build the dataclass `fields` from the mapping `cfg`, as an OmegaConf structured config.

    A list is accepted for a field of one number (a schedule) that declares no range, an int for
    ``Union[float, str]``. Raises :class:`UserError`, one line that names the class and the key, for
    an unknown key (with the nearest field), a missing value, a value of the wrong type or out of
    the range that the field declares (see :mod:`threestudio.utils.ranges`). `prefix`: the full key
    of `cfg`, where it is not a part of the config that it came with.
    """
    where = where or getattr(fields, "__qualname__", str(fields))
    cfg = {} if cfg is None else cfg

    def full_key(key: Any) -> str:
        return f"{prefix}.{key}" if prefix else _full_key(cfg, key)

    known = {f.name for f in dataclasses.fields(fields) if f.init}
    annotations = typing.get_type_hints(fields)
    values = {}
    for key in cfg:
        if key not in known:
            raise unknown_field(where, key, full_key(key), known)
        value = _read_value(cfg, key, full_key(key))
        _check_kind(f"{where}: {full_key(key)}", value, annotations[key])
        values[key] = _adapt(value, annotations[key])
    hints = declared_annotations(fields)
    for key in values:  # a list that OmegaConf will not compare with the field, again before then
        if is_list(values[key]) and typing.get_origin(hints[key]) is typing.Annotated:
            checked(full_key(key), values[key], hints[key])
    try:
        conf = OmegaConf.structured(fields(**values))
    except UserError:
        raise
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        if typing.get_origin(hints.get(key)) is typing.Annotated:  # whose own words are plainer
            checked(full_key(key), values.get(key), hints[key])
        raise UserError(f"{where}, field {full_key(key)!r}: {_first_line(error)}") from None
    # such as a field without default that is not given, or an int that no float can hold
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {_first_line(error)}") from None
    for key, hint in hints.items():
        if key in values and typing.get_origin(hint) is typing.Annotated:
            value = conf[key]
            kept = checked(full_key(key), value, hint)
            if kept is not value:
                conf[key] = kept
    refuse_contradictions(fields, conf, full_key)
    return conf
