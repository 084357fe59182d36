"""What the classes that a config names take, read from their source: nothing of it is imported.

The fields of a ``Config`` stand in the text of its class and of its bases, so a misspelt option can
be told before torch, Lightning and the extensions are imported. Whatever the text does not show
beyond doubt (a class made by a function, a base from another package) is left to the run, which
looks at the classes themselves.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import threestudio

_HOST = Path(threestudio.__file__).parent
_COMPOUND = (ast.If, ast.Try, ast.TryStar, ast.With, ast.For, ast.While)
_REGISTERED = re.compile(r"""register\(\s*["']([^"'\n]+)["']""")


@dataclass(frozen=True)
class Declared:
    """The settings of a class: as messages call them, their names, and the texts among their
    defaults."""

    where: str
    names: frozenset[str]
    defaults: Mapping[str, str]


@dataclass(frozen=True)
class _Class:
    file: Path
    node: ast.ClassDef
    name: str  # with the classes around it, "MeshExporter.Config"


class _Doubt(Exception):
    """The text does not show it."""


class Sources:
    """The classes that the host and the extensions in `folders` register."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._files: dict[str, set[Path]] = {}
        for file in _python_files([*(_HOST / part for part in threestudio._BUILT_IN), *folders]):
            for name in _REGISTERED.findall(_text(file)):
                self._files.setdefault(name, set()).add(file)

    def declared(self, name: str) -> Declared | None:
        """The settings of the class that is registered as `name`; None where there is a doubt."""
        try:
            config = self._nested(self._registered(name), "Config")
            fields = self._fields(config)
        except (_Doubt, RecursionError):
            return None
        texts = {
            key: value.value
            for key, value in fields.items()
            if isinstance(value, ast.Constant) and isinstance(value.value, str)
        }
        return Declared(config.name, frozenset(fields), texts)

    # --- classes --------------------------------------------------------------------------------

    def _registered(self, name: str) -> _Class:
        found = [
            _Class(file, node, node.name)
            for file in self._files.get(name, ())
            for node in _tree(file).body
            if isinstance(node, ast.ClassDef)
            and any(_called_with(each, name) for each in node.decorator_list)
        ]
        if len(found) != 1 or len(found[0].node.decorator_list) != 1:
            raise _Doubt
        return found[0]

    def _resolve(self, file: Path, expression: ast.expr) -> _Class:
        """The class that an expression at the top of a file means."""
        if isinstance(expression, ast.Attribute):
            return self._nested(self._resolve(file, expression.value), expression.attr)
        if isinstance(expression, ast.Name):
            return self._named(file, expression.id)
        if isinstance(expression, ast.Call) and ast.unparse(expression.func) == "threestudio.find":
            names = [n for n in self._files if _called_with(expression, n)]
            return self._registered(names[0] if names else "")
        raise _Doubt

    def _named(self, file: Path, name: str) -> _Class:
        nodes = [node for node in _statements(_tree(file).body) if name in _bound(node)]
        if len(nodes) != 1 or nodes[0] not in _tree(file).body:
            raise _Doubt
        node = nodes[0]
        if isinstance(node, ast.ClassDef):
            return _Class(file, node, name)
        if isinstance(node, ast.ImportFrom):
            alias = next(each for each in node.names if (each.asname or each.name) == name)
            return self._named(_module(file, node), alias.name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            return self._resolve(file, node.value)
        raise _Doubt

    def _nested(self, cls: _Class, name: str) -> _Class:
        """``cls.name``, of its own or inherited."""
        for node in cls.node.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return _Class(cls.file, node, f"{cls.name}.{name}")
            if isinstance(node, ast.Assign) and name in _bound(node):
                return self._resolve(cls.file, node.value)
        for base in cls.node.bases:
            return self._nested(self._resolve(cls.file, base), name)
        raise _Doubt

    def _fields(self, config: _Class) -> dict[str, ast.expr | None]:
        """The fields of a dataclass, with their defaults where these are written as such."""
        found: dict[str, ast.expr | None] = {}
        for base in reversed(config.node.bases):
            found |= self._fields(self._resolve(config.file, base))
        own = [node for node in config.node.body if isinstance(node, ast.AnnAssign)]
        made = [ast.unparse(each) for each in config.node.decorator_list]
        if config.node.keywords or made not in (["dataclass"], ["dataclasses.dataclass"]):
            raise _Doubt
        if any(isinstance(node, _COMPOUND) for node in config.node.body):
            raise _Doubt
        for node in own:
            if "ClassVar" in ast.unparse(node.annotation) or not isinstance(node.target, ast.Name):
                continue
            if isinstance(node.value, ast.Call) and any(
                each.arg == "init" for each in node.value.keywords
            ):
                raise _Doubt
            found[node.target.id] = node.value
        return found


# --- text ---------------------------------------------------------------------------------------


def _python_files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        found = [folder] if folder.suffix == ".py" else sorted(folder.rglob("*.py"))
        yield from (file.resolve() for file in found)


@functools.cache
def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):  # which the import will say
        return ""


@functools.cache
def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(_text(file))
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _called_with(expression: ast.expr, name: str) -> bool:
    """Whether an expression calls something with the text `name` alone."""
    if not isinstance(expression, ast.Call) or len(expression.args) != 1:
        return False
    value = expression.args[0]
    return isinstance(value, ast.Constant) and value.value == name


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, with those within ``if``, ``try`` and the like."""
    for node in body:
        yield node
        if isinstance(node, _COMPOUND):
            for inner in ast.iter_child_nodes(node):
                within = inner.body if isinstance(inner, ast.ExceptHandler) else [inner]
                yield from _statements(each for each in within if isinstance(each, ast.stmt))


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement gives a meaning."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {each.id for target in targets if target for each in _names(target)}


def _names(target: ast.expr) -> Iterator[ast.Name]:
    yield from (node for node in ast.walk(target) if isinstance(node, ast.Name))


def _module(file: Path, node: ast.ImportFrom) -> Path:
    """The file of the module that ``from ... import`` in `file` means."""
    words = node.module.split(".") if node.module else []
    if node.level:
        folder = file.parents[node.level - 1]
    elif words[0] == _HOST.name:
        folder = _HOST.parent
    else:
        spec = importlib.util.find_spec(words[0])
        if spec is None or not spec.submodule_search_locations:
            raise _Doubt
        folder = Path(next(iter(spec.submodule_search_locations))).parent
    module = folder.joinpath(*words)
    for found in (module.with_suffix(".py"), module / "__init__.py"):
        if found.is_file():
            return found
    raise _Doubt


# --- a config -----------------------------------------------------------------------------------


def sections(cfg: Any, declared: Any) -> Iterator[tuple[str, Any, Declared]]:
    """``(full key, section, what it takes)`` of the sections of a config whose classes are known;
    `declared` gives the settings of a class by its name, or None."""
    for key in ("data", "system"):
        kind = cfg.get(f"{key}_type")
        known = declared(kind) if isinstance(kind, str) and hasattr(cfg.get(key), "get") else None
        if known is not None:
            yield key, cfg[key], known
    system = declared(cfg.system_type) if isinstance(cfg.get("system_type"), str) else None
    if system is None:
        return
    for name in sorted(system.names):
        part = name.removesuffix("_type")
        section = cfg.system.get(part) if part != name else None
        kind = cfg.system.get(name, system.defaults.get(name))
        if not (hasattr(section, "get") and isinstance(kind, str)):
            continue
        known = declared(kind)
        if known is not None:
            yield f"system.{part}", section, known
