r"""One YAML from a configuration and its overlays, for launchers that take one ``--config``.

    python custom/threestudio-lods/merge.py -o merged.yaml configs/lods-ngp-lora.yaml \
        configs/pocket-ngp.yaml

Later files go over earlier ones; ``key=value`` after them goes over all. Interpolations stay as
they are, so that the merged file takes overrides like the others. Of settings for one type
(``guidance_for``) those of the chosen type are taken. What only the threestudio of this repository
knows is left out or replaced, and said: upstream's 0.2.3 refuses it, or fails at the end of a run.

It needs omegaconf and nothing else of this extension.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Keys that upstream has not, and the type of the part that must be in use (None: any).
HOST_ONLY = {
    "data.rays": None,
    "data.random_camera.rays": None,
    "system.on_nonfinite": None,
    "system.max_skipped_steps": None,
    "system.renderer.backend": "nerf-volume-renderer",
    "system.exporter.axes": "mesh-exporter",
    "system.exporter.glb_colors": "mesh-exporter",
    "system.exporter.texture_faces": "mesh-exporter",
    "system.geometry.pos_encoding_config.backend": None,
    "trainer.accelerator": None,  # upstream's launcher sets these two itself
    "trainer.devices": None,
}
# Formats of the mesh exporter that upstream has not, and what comes nearest.
FORMATS = {"glb": "obj-mtl", "ply": "obj"}


def merge(files, overrides=()) -> DictConfig:
    """The files and overrides (``"a.b=1"``), merged but not resolved. Raises ``ValueError``, one
    line, for what cannot be read or merged."""
    layers = [_load(file) for file in files]
    layers += [_override(text, _merged(*layers)) for text in overrides]
    try:
        whole = _merged(*layers)
        return _merged(*(_with_chosen_types(layer, whole) for layer in layers))
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        raise ValueError(f"these files cannot be merged: {_first_line(error)}") from None


def _merged(*layers: DictConfig) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(*layers))


def for_upstream(conf: DictConfig) -> tuple[DictConfig, list[str]]:
    """(a copy without what upstream's threestudio does not know, what was changed in words)."""
    conf, said = conf.copy(), []
    for key, kind in HOST_ONLY.items():
        section, _, name = key.rpartition(".")
        part = _plain(conf, section)
        chosen = _plain(conf, "system").get(f"{section.rpartition('.')[2]}_type", "mesh-exporter")
        if name in part and kind in (None, chosen):
            part.pop(name)
            said.append(f"{key} is left out: upstream does not know it")
    exporter = _plain(conf, "system.exporter")
    kind = _plain(conf, "system").get("exporter_type", "mesh-exporter")
    new = FORMATS.get(exporter.get("fmt")) if kind == "mesh-exporter" else None
    if new:
        said.append(f"system.exporter.fmt is now {new}: upstream has no {exporter.fmt}")
        exporter.fmt = new
    return conf, said


def _load(file) -> DictConfig:
    try:
        conf = OmegaConf.load(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except Exception as error:  # of YAML's many kinds
        raise ValueError(f"{file} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(conf, DictConfig):
        raise ValueError(f"{file} is not a YAML mapping")
    return conf


def _override(text: str, base: DictConfig) -> DictConfig:
    """``a.b=1`` as a config. A key with dots in it, such as the optimizer's ``geometry.means``, is
    recognised where ``base`` has it."""
    path, _, value = text.partition("=")
    where: Any = base
    nested, parts = OmegaConf.from_dotlist([f"x={value}"])["x"], path.split(".")
    names = []
    while parts:
        known = list(where) if isinstance(where, DictConfig) else []
        fitting = [n for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in known]
        length = fitting[0] if fitting else 1
        names.append(".".join(parts[:length]))
        where = where._get_node(names[-1]) if names[-1] in known else None
        parts = parts[length:]
    for name in reversed(names):
        nested = {name: nested}
    return OmegaConf.create(nested)


def _with_chosen_types(layer: DictConfig, whole: DictConfig) -> DictConfig:
    """``layer`` with its ``<name>_for`` of the type that ``whole`` has put into ``<name>``."""
    plain: Any = OmegaConf.to_container(layer)  # interpolations stay as they are
    for part, types in ((plain, whole), (plain.get("system"), whole.get("system"))):
        for key in [k for k in part or () if str(k).endswith("_for")]:
            name = key[: -len("_for")]
            if f"{name}_type" in types:
                chosen = part.pop(key).get(types[f"{name}_type"])
                part[name] = OmegaConf.merge(part.get(name) or {}, chosen or {})
    return OmegaConf.create(plain)


def _plain(conf: DictConfig, path: str) -> DictConfig:
    """The mapping at ``path``, or an empty one: interpolations are not followed."""
    for name in path.split("."):
        node = conf._get_node(name)
        if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
            return OmegaConf.create()
        conf = node
    return conf


def _first_line(error: Exception) -> str:
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())


def main(argv=None, prog: str | None = None) -> int:
    """The command; returns the exit status, 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE | KEY=VALUE")
    parser.add_argument("-o", "--output", help="the YAML to write (default: standard output)")
    parser.add_argument("--keep", action="store_true", help="keep what upstream does not know")
    args = parser.parse_intermixed_args(argv)
    files = [name for name in args.files if os.path.exists(name) or "=" not in name]
    try:
        if not files:
            raise ValueError("there is no file to merge, only overrides")
        conf = merge(files, [name for name in args.files if name not in files])
        conf, said = (conf, []) if args.keep else for_upstream(conf)
        _write(conf, files, args.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in said:
        print(line, file=sys.stderr)
    if args.output is not None:
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def _write(conf: DictConfig, files, output) -> None:
    text = f"# merged from {', '.join(files)}\n" + OmegaConf.to_yaml(conf)
    if output is None:
        print(text, end="")
        return
    path = Path(output)
    if any(path.exists() and os.path.samefile(path, file) for file in files):
        raise ValueError(f"{output} is one of the files to merge: write to another")
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise ValueError(f"{output} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
