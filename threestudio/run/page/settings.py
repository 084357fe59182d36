"""The settings of a run, and what of them is not the default."""

import dataclasses
import inspect
import io
import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from threestudio.run.page.files import Folder
from threestudio.utils.safe_yaml import MAX_BYTES

PARSED = "configs/parsed.yaml"
CHANGES = "interventions.jsonl"  # what somebody changed while the run was trained
UNKNOWN = object()  # the default of what no class declares
# what says where and when a run was, not what it is
PLACES = {"exp_root_dir", "exp_dir", "trial_name", "trial_dir", "timestamp", "use_timestamp"}
PLACES |= {"tag", "name", "description", "n_gpus", "resume"}


def read_settings(folder: Folder) -> dict[str, Any]:
    """The config that a run has saved, as plain values; {} where there is none that can be read."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from threestudio.utils.config import config_to_primitive
    from threestudio.utils.errors import UserError
    from threestudio.utils.safe_yaml import check_yaml

    text = folder.text(PARSED, MAX_BYTES)
    try:
        check_yaml(text)
        # not resolved: a page is passed on, and ${oc.env:NAME} would be a variable of this machine
        found = config_to_primitive(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, UserError, OSError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a tree of mappings, by their dotted keys; an empty mapping is none."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every setting of a run that a class declares: those of the experiment, of the
    parts that the settings name (``<part>_type``), of Lightning's trainer and of its checkpoints.
    Nothing is imported for it but Lightning: a part of an extension that is not loaded has none."""
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import ModelCheckpoint

    from threestudio.utils.config import ExperimentConfig

    found = dict(_declared(ExperimentConfig))
    found |= _of_parts(settings)
    for section, call in (("trainer", Trainer.__init__), ("checkpoint", ModelCheckpoint.__init__)):
        for name, parameter in inspect.signature(call).parameters.items():
            if parameter.default is not parameter.empty:
                found[f"{section}.{name}"] = parameter.default
    return found


def _of_parts(section: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found = {}
    for key, value in section.items():
        if not key.endswith("_type") or not isinstance(value, str):
            continue
        part = key[: -len("_type")]
        name = f"{before}{part}."
        found |= {f"{name}{k}": v for k, v in _declared(_config_of(value))}
        if isinstance(section.get(part), Mapping):
            found |= _of_parts(section[part], name)
    return found


def _config_of(name: str) -> type | None:
    import threestudio

    try:
        return getattr(threestudio.find(name), "Config", None)
    except Exception:  # of an extension that is not here, or a name that somebody else wrote
        return None


def _declared(fields: type | None) -> Iterator[tuple[str, Any]]:
    for each in dataclasses.fields(fields) if dataclasses.is_dataclass(fields) else ():
        if each.default is not dataclasses.MISSING:
            yield each.name, each.default
        elif each.default_factory is not dataclasses.MISSING:
            value = each.default_factory()
            if isinstance(value, Mapping):
                yield from flat(value, f"{each.name}.")
            else:
                yield each.name, value


def differing(settings: Mapping[str, Any], known: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, value and default (or UNKNOWN) of all settings that are not the default. Where the run
    was written is not among them."""
    found = []
    for key, value in flat(settings):
        default = known.get(key, UNKNOWN)
        if key not in PLACES and not _same(value, default):
            found.append((key, value, default))
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return (type(a) is type(b) and a == b) or (_is_number(a) and _is_number(b) and a == b)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text_of(value: Any) -> str:
    """A value as it is written in a config."""
    if value is UNKNOWN:
        return "—"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(text_of, value))}]"
    return f'"{value}"' if value == "" else str(value)


@dataclasses.dataclass(frozen=True)
class Command:
    """How a run was called."""

    words: list[str]

    @property
    def program(self) -> list[str]:
        """The words before the first option."""
        end = next((i for i, w in enumerate(self.words) if w.startswith("-")), len(self.words))
        return self.words[:end]

    @property
    def overrides(self) -> list[str]:
        """The settings among its words; a file's name may hold an equals sign too."""
        first = next((i for i, w in enumerate(self.words) if w == "--config"), 0)
        return [
            word
            for word in self.words[first:]
            if "=" in word and not word.startswith("-") and not word.endswith((".yaml", ".yml"))
        ]

    @property
    def kept(self) -> list[str]:
        """Options that a repetition needs too."""
        found: list[str] = []
        for option, value in zip(self.words, self.words[1:]):
            if option in ("--gpu", "--extensions"):
                found += [option, value]
        return found

    def __str__(self) -> str:
        return shlex.join(self.words)


def read_command(folder: Folder) -> Command | None:
    """The command that trained a run, from its ``cmd.txt``, whose last line is what was made of
    it; a prompt may have several lines."""
    text = folder.text("cmd.txt").rpartition("\nNamespace(")[0]
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    return Command(words) if words else None


def read_changes(folder: Folder) -> list[list[str]]:
    """Step, setting, old and new value of what was changed while a run was trained."""
    found = []
    for line in folder.text(CHANGES).splitlines():
        try:
            change = json.loads(line)
            found.append([text_of(change[key]) for key in ("step", "what", "old", "new")])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found


def repeating(
    command: Command, settings: Mapping[str, Any], home: str, steered: bool = False
) -> str:
    """The command that trains the run in ``home`` once more, from its start, with the settings it
    has saved, whatever has become of the config files since, and if it was ``steered`` with the
    same changes at the same steps."""
    words = [*command.program, "--config", f"{home}/{PARSED}", "--train", *command.kept]
    if steered:
        words += ["--replay", f"{home}/{CHANGES}"]
    if settings.get("resume") is not None:
        words.append("resume=null")
    return shlex.join([*words, *_callbacks(settings)])


def _callbacks(settings: Mapping[str, Any]) -> list[str]:
    """The callbacks that a run's saved config names count only when they are said again."""
    from omegaconf import OmegaConf

    from threestudio.run.named_callbacks import said_again

    named = (settings.get("trainer") or {}).get("callbacks")
    if not named:
        return []
    return said_again(OmegaConf.create({"trainer": {"callbacks": named}}))
