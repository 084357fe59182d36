"""Grids: which methods are compared, on which representations, prompts and seeds.

A grid is a YAML file:

    methods:                      # by the name that tables show
      csd:
        guidance_type: lods-csd-guidance
        overrides: {key: value}   # on all representations
        tune: {key: [value, ...]} # every combination is a run of its own
        settings: [{key: value}]  # and so is each of these
        representations: {nerf: {overrides: ..., tune: ..., settings: ...}}  # in addition, on this
    representations:
      nerf:
        configs: [configs/lods-ngp-embedding.yaml, configs/pocket-shapes-ngp.yaml]
        steps: 400
        views: 24                 # test views around the object (not of latents)
        overrides: {key: value}
        tune: {key: [value, ...]} # for every method
        methods: [csd]            # if not all; so for prompts and seeds
    prompts: [a blue car]
    seeds: [0, 1]
    overrides: {key: value}       # on all representations
    world: shapes                 # that of the prompts: shapes, or objects (pocket/world.py)
    judge: true                   # prompts are of this world: its metrics are computed
    true_renders: true            # one more method, "true-renders": the ceiling of each metric
    clip: null                    # folder or hub id of a CLIP for clip_score
    gpus: 0                       # of a run on Ray
    sheets: false                 # keep contact sheets of settings that are tried, too

Keys of overrides are those of launch.py's command line, ``${...}`` included, and ``scene_lr``: a
factor on all learning rates but that of the learned part. Later ones win: grid, representation,
method, method on the representation, tune, settings. ``priors`` and ``canvases``, the names that
``methods`` and ``representations`` had, are read too, and are still the columns of the tables.
"""

import hashlib
import io
import itertools
import json
import math
import re
import shlex
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evaluation.worlds import DEFAULT, WORLDS
from threestudio.utils.config import parse_structured
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.safe_yaml import check_yaml, read_limited
from threestudio.utils.typing import *

TRUE = "true-renders"
CELL = ("grid", "canvas", "prior", "prompt", "seed")  # columns
IDENTITY = (*CELL, "settings", "steps", "digest")
ALIASES = {"priors": "methods", "canvases": "representations"}
# Configs that were renamed after runs with them had been measured, which are the same runs still.
MOVED = {
    "configs/pocket-shapes.yaml": "configs/pocket.yaml",
    "configs/pocket-shapes-ngp.yaml": "configs/pocket-ngp.yaml",
}
# Bounds that no comparison reaches: what is beyond them is a slip, and would only be found by
# a process that lists runs until its memory is full.
MAX_RUNS, MAX_STEPS, MAX_VIEWS, MAX_GPUS = 20_000, 10_000_000, 1_000, 64
NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, surrogates and line ends
MAX_PROMPT = 10_000  # characters; a text encoder reads some 77 words
SCENE_LR = "scene_lr"
# keys of launch.py that a grid has a place of its own for
PLACES = {
    "trainer.max_steps": "steps",
    "seed": "seeds",
    "data.n_test_views": "views",
    "system.prompt_processor.prompt": "prompts",
    "system.guidance_type": "guidance_type",
}


@dataclass
class GridConfig:
    methods: dict
    representations: dict
    prompts: List[str]
    seeds: List[int]
    overrides: dict = field(default_factory=dict)
    judge: bool = True
    true_renders: bool = True
    clip: Optional[str] = None
    gpus: float = 0.0
    world: str = DEFAULT
    sheets: bool = False


@dataclass
class RepresentationConfig:
    configs: List[str]
    steps: int
    views: int = 24
    overrides: dict = field(default_factory=dict)
    tune: dict = field(default_factory=dict)
    methods: Optional[List[str]] = None
    prompts: Optional[List[str]] = None
    seeds: Optional[List[int]] = None


@dataclass
class OnRepresentationConfig:
    overrides: dict = field(default_factory=dict)
    tune: dict = field(default_factory=dict)
    settings: list = field(default_factory=lambda: [{}])


@dataclass
class MethodConfig(OnRepresentationConfig):
    guidance_type: str = ""
    representations: dict = field(default_factory=dict)


def slug(*parts: Any) -> str:
    """Letters, digits and dashes, at most 60 of each part. A part that is cut or has other letters
    ends with a digest, so that another one is not taken for it."""
    return "-".join(map(_slug, map(str, parts)))


def _slug(text: str) -> str:
    clean = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if clean and len(clean) <= 60 and text.isascii():
        return clean
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{clean[:50].strip('-')}-{digest}".strip("-")


@dataclass(frozen=True)
class Run:
    """One cell of a grid. What sets it apart is ``identity``; the rest follows from the grid."""

    grid: str
    representation: str
    method: str
    prompt: str
    seed: int
    settings: str  # the method's overrides on this representation: key=value, separated by blanks
    steps: int
    configs: Tuple[str, ...]
    overrides: Tuple[str, ...]  # of launch.py's kind, all of them
    guidance_type: str = ""
    scene_lr: float = 1.0
    views: int = 24
    judge: bool = True
    clip: Optional[str] = None
    world: str = DEFAULT

    @classmethod
    def of(cls, fields: Dict[str, Any]) -> "Run":
        """From ``asdict``, also if it has been JSON since."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    @property
    def digest(self) -> str:
        """Of all that the grid says beyond the other names: a changed grid has other runs. What is
        in the configs is not in it; a table's column ``commit`` has that."""
        configs = tuple(MOVED.get(name, name) for name in self.configs)
        says = (configs, sorted(self.overrides), self.guidance_type, self.scene_lr)
        # runs that were measured when there was one world keep their digests
        world = () if self.world == DEFAULT else (self.world,)
        says = json.dumps((*says, self.views, self.judge, self.clip, *world))
        return hashlib.sha256(says.encode()).hexdigest()[:8]

    @property
    def identity(self) -> Dict[str, str]:
        """As the cells of a table."""
        names = {"canvas": "representation", "prior": "method"}  # the columns keep their names
        return {column: str(getattr(self, names.get(column, column))) for column in IDENTITY}

    @property
    def title(self) -> str:
        settings = f" [{self.settings}]" if self.settings else ""
        return f"{self.representation} {self.method} {self.prompt!r} seed {self.seed}{settings}"

    @property
    def slug(self) -> str:
        """Its cell as the name of a file in the folder ``grid``."""
        return slug(self.representation, self.method, self.prompt, self.seed)


@dataclass(frozen=True)
class Grid:
    name: str
    runs: Tuple[Run, ...]
    gpus: float
    tuning: bool  # whether settings are tried: rows then go to a table of their own
    world: str = DEFAULT
    sheets: bool = False  # whether settings that are tried have contact sheets


def written(value: Any) -> str:
    """A value as launch.py's command line takes it: YAML without blanks, texts as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    if isinstance(value, (list, tuple)):
        parts = (json.dumps(v) if isinstance(v, str) else written(v) for v in value)
        return f"[{','.join(parts)}]"
    return json.dumps(value, separators=(",", ":"))


def _settings(overrides: Dict[str, Any]) -> str:
    return shlex.join(f"{key}={written(value)}" for key, value in sorted(overrides.items()))


def _read(path: Path) -> Dict[str, Any]:
    try:
        text = read_limited(path)
        check_yaml(text, str(path))
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except OSError as error:
        raise UserError(f"the grid {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a YAML mapping")
    return loaded


def _parse(kind: type, value: Any, where: str) -> Any:
    """``kind`` filled from a mapping, with plain values; unknown keys are refused."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping, not {value!r}")
    for old, new in ALIASES.items():
        if old in value and new in value:
            raise UserError(f"{where} has {old} and {new}, which are the same: write {new} alone")
    value = {ALIASES.get(key, key): v for key, v in value.items()}
    parsed = parse_structured(kind, value, where)
    return kind(**OmegaConf.to_container(parsed, resolve=False))


def _known(names: Iterable, choices: Iterable, where: str) -> None:
    choices = list(choices)
    for name in names:
        if name not in choices:
            hint = nearest(name, map(str, choices))
            hint = hint or f": there are {', '.join(map(str, choices))}"
            raise UserError(f"{where} has no {name!r}{hint}")


def _combinations(tune: Dict[str, Any], where: str) -> Iterable[Dict[str, Any]]:
    for key, values in tune.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: tune.{key} must be a list of values, not {values!r}")
    _bound(math.prod(map(len, tune.values())), f"{where}, tune")
    for values in itertools.product(*tune.values()):
        yield dict(zip(tune, values))


def _bound(runs: int, where: str) -> None:
    if runs > MAX_RUNS:
        raise UserError(
            f"{where}: {runs:,} runs are more than {MAX_RUNS:,}; leave out values, methods, "
            "prompts or seeds"
        )


def _once(values: Iterable, where: str) -> None:
    twice = [value for value, n in Counter(values).items() if n > 1]
    if twice:
        raise UserError(f"{where} has {str(twice[0])[:80]!r} twice")


def _check_values(grid: GridConfig, where: str) -> None:
    """Refuse prompts and seeds that no run could be made with."""
    for prompt in grid.prompts:
        if len(prompt) > MAX_PROMPT:
            raise UserError(
                f"{where}: a prompt has {len(prompt):,} characters, more than {MAX_PROMPT:,}: "
                f"{prompt[:40]!r}..."
            )
        if any(unicodedata.category(c) in NO_TEXT for c in prompt):
            raise UserError(
                f"{where}: the prompt {prompt[:80]!r} has a line break or another control "
                "character: leave it out"
            )
    for key in ("prompts", "seeds"):
        _once(getattr(grid, key), f"{where}: {key}")
    for seed in grid.seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"{where}: a seed is a number from 0 to 4294967295, not {seed}")
    if not 0 <= grid.gpus <= MAX_GPUS:
        raise UserError(f"{where}: gpus must be from 0 to {MAX_GPUS}, not {grid.gpus}")


def _scene_lr(overrides: Dict[str, Any], where: str) -> float:
    value = overrides.pop(SCENE_LR, 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{where}: {SCENE_LR} must be a number above 0, not {value!r}")
    return float(value)


def _choose(on: RepresentationConfig, grid: GridConfig, methods: List[str], where: str) -> None:
    """Fill in what a representation does not choose, and refuse what it cannot."""
    for key, every in {"methods": methods, "prompts": grid.prompts, "seeds": grid.seeds}.items():
        chosen = getattr(on, key)
        _known(chosen or (), every, f"{where}: {key}")
        _once(chosen or (), f"{where}: {key}")
        setattr(on, key, every if chosen is None else chosen)
    if on.steps < 1 or on.views < 2:
        raise UserError(f"{where}: at least 1 step and 2 views are needed")
    if on.steps > MAX_STEPS or on.views > MAX_VIEWS:
        raise UserError(f"{where}: at most {MAX_STEPS:,} steps and {MAX_VIEWS:,} views")


def load_grid(path) -> Grid:
    """The grid in a YAML file, with all its runs in the order representation, prompt, seed, method.

    Raises :class:`UserError`, one line, for a key, method, representation, prompt or seed that is
    not there, a value of the wrong type, and, with ``judge``, a prompt that is not of the grid's
    world.
    """
    path = Path(path)
    where = str(path)
    grid = _parse(GridConfig, _read(path), where)
    methods = {
        name: _parse(MethodConfig, value, f"{where}, method {name}")
        for name, value in grid.methods.items()
    }
    representations = {
        name: _parse(RepresentationConfig, value, f"{where}, representation {name}")
        for name, value in grid.representations.items()
    }
    for name, method in methods.items():
        if name == TRUE or not method.guidance_type:
            raise UserError(
                f"{where}, method {name}: "
                + (f"{TRUE} is not a method" if name == TRUE else "guidance_type is missing")
            )
        _known(method.representations, representations, f"{where}, method {name}: representations")
    _check_values(grid, where)
    _known([grid.world], WORLDS, f"{where}: world")
    world = WORLDS[grid.world]
    for prompt in grid.prompts if grid.judge else ():
        try:
            world.labels(prompt)
        except ValueError as error:
            raise UserError(f"{where}: {error}; for other prompts, set judge: false") from None
    for name, chosen in representations.items():
        _choose(chosen, grid, list(methods), f"{where}, representation {name}")
        if world.views not in (None, chosen.views):
            raise UserError(
                f"{where}, representation {name}: views must be {world.views}, those of the truth "
                f"in the world {grid.world}, not {chosen.views}"
            )
    tuned, runs = False, []
    for name, representation in representations.items():
        cells = {}
        for method in representation.methods:
            cells[method] = list(_cells(grid, name, representation, method, methods[method], where))
            tuned |= len(cells[method]) > 1
            each = sum(map(len, cells.values())) + (grid.judge and grid.true_renders)
            _bound(
                len(runs) + each * len(representation.prompts) * len(representation.seeds), where
            )
        for prompt, seed in itertools.product(representation.prompts, representation.seeds):
            common = dict(
                grid=path.stem,
                representation=name,
                prompt=prompt,
                seed=seed,
                configs=tuple(representation.configs),
                views=representation.views,
                judge=grid.judge,
                clip=grid.clip,
                world=grid.world,
            )
            runs += [
                Run(**common, method=method, steps=representation.steps, **cell)
                for method in representation.methods
                for cell in cells[method]
            ]
            if grid.judge and grid.true_renders:
                plain = tuple(
                    f"{k}={written(v)}"
                    for k, v in (grid.overrides | representation.overrides).items()
                    if k != SCENE_LR
                )
                runs.append(Run(**common, method=TRUE, steps=0, settings="", overrides=plain))
    return Grid(path.stem, tuple(runs), grid.gpus, tuned, grid.world, grid.sheets)


def _cells(grid, name, representation, method_name, method, where) -> Iterable[Dict[str, Any]]:
    """What sets apart the runs of a method on a representation: one a combination of ``tune``."""
    here = f"{where}, method {method_name} on {name}"
    more = _parse(OnRepresentationConfig, method.representations.get(name) or {}, here)
    for settings in (method.settings, more.settings):
        if not settings or not all(isinstance(s, dict) for s in settings):
            raise UserError(f"{here}: settings must be a list of mappings, not {settings!r}")
    tuned = list(_combinations(representation.tune | method.tune | more.tune, here))
    _bound(len(tuned) * len(method.settings) * len(more.settings), here)
    for chosen, *settings in itertools.product(tuned, method.settings, more.settings):
        own = method.overrides | more.overrides | chosen | settings[0] | settings[1]
        every = grid.overrides | representation.overrides | own
        for key in every.keys() & PLACES.keys():
            raise UserError(f"{here}: {key} is no override here, write {PLACES[key]} in the grid")
        yield {
            "settings": _settings(own),
            "scene_lr": _scene_lr(every, here),
            "guidance_type": method.guidance_type,
            "overrides": tuple(f"{key}={written(value)}" for key, value in every.items()),
        }
