"""The methods of this library and what their guidances take, read from the source.

Importing a method imports torch; a misspelt name or option can be told long before that. A test
compares what is read here with the classes themselves.
"""

import ast
import functools
import re
from pathlib import Path

_HERE = Path(__file__).parent
_REGISTERED = re.compile(r'^@register\("([^"]+)"\)', re.MULTILINE)
# the dataclasses, beside the Config of every method, whose fields a guidance has
_SHARED = {
    "models/memory.py": ("ModelSettings",),
    "methods/reconstruction.py": ("Rescaling",),
    "methods/inversion.py": ("Inversion",),
    "threestudio/guidance.py": ("HostSettings", "Accepted"),
}
_OF_THE_HOST = ("weights",)  # of threestudio's BaseModule.Config


def method_names() -> list[str]:
    """The names of our methods."""
    return sorted(name for file in _methods() for name in _REGISTERED.findall(file.read_text()))


def settings_of(name: str) -> frozenset[str] | None:
    """The names of the settings that the guidance ``name`` of one of our methods takes; None for
    anything else."""
    method = name.removesuffix("-guidance")
    return _settings() if method != name and method in method_names() else None


@functools.cache
def _settings() -> frozenset[str]:
    """Those of every guidance: each accepts the settings of all our methods."""
    names = set(_OF_THE_HOST)
    for file in _methods():
        names |= _fields(file, ("Config",))
    for file, classes in _SHARED.items():
        names |= _fields(_HERE / file, classes)
    return frozenset(names)


def _methods() -> list[Path]:
    return sorted((_HERE / "methods").glob("*.py"))


def _fields(file: Path, classes: tuple[str, ...]) -> set[str]:
    return {
        field.target.id
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and node.name in classes
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }
