"""Optimisers and schedulers from a config."""

import inspect

import torch
from torch import nn
from torch.optim import lr_scheduler

import threestudio
from threestudio.systems.optimizer_options import Rates
from threestudio.systems.optimizers import Adan, fused_adam
from threestudio.utils.config import config_to_primitive
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.typing import *


def get_parameters(model: nn.Module, name: str) -> List[nn.Parameter]:
    """The parameters under the dotted `name` in `model`: those of a module, one parameter, or []
    for anything else. Raises :class:`UserError` if there is no such attribute."""
    found = model
    for depth, part in enumerate(name.split(".")):
        try:
            found = getattr(found, part)
        except AttributeError:
            parent = ".".join(name.split(".")[:depth])
            # what could have been meant: submodules and parameters of the last part that exists
            near = []
            if isinstance(found, nn.Module):
                near = [k for k, _ in found.named_children()] + list(found._parameters)
            path = f"{parent}." if parent else ""
            raise UserError(
                f"optimizer.params names {name!r}, but the system has no {path}{part}"
                f"{nearest(part, near)}"
            ) from None
    if isinstance(found, nn.Module):
        return list(found.parameters())
    return [found] if isinstance(found, nn.Parameter) else []


def _primitive(config) -> Any:
    return config_to_primitive(config) if not isinstance(config, (dict, list)) else config


def _optimizer_class(name: Optional[str]) -> type:
    if not name:
        raise UserError("optimizer.name is missing: a class of torch.optim, such as Adam")
    if name in ("Adan", "FusedAdam"):
        return Adan if name == "Adan" else fused_adam()
    cls = getattr(torch.optim, str(name), None)
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)) or name == "Optimizer":
        names = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n != "Optimizer"]
        hint = nearest(name, names) or f": it has {', '.join(sorted(names))}"
        raise UserError(f"optimizer.name: torch.optim has no {name!r}{hint}")
    return cls


def parse_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that `config` describes.

    ``name``: a class of ``torch.optim``, ``Adan``, or ``FusedAdam`` (of apex). ``args``: its
    arguments. ``params``: a mapping from dotted names in `model` to group arguments, one group each
    (the group keeps the name under ``name``); ONLY these are trained. Without ``params`` all
    parameters are. A named module without parameters is dropped, with one log line; a name that
    does not exist is an error.
    """
    config = _primitive(config)
    _refuse_unknown(config, ("name", "args", "params"), "optimizer")
    cls = _optimizer_class(config.get("name"))
    _check_betas(cls, config.get("args"), "optimizer.args")
    if config.get("params"):
        groups = []
        for name, args in config["params"].items():
            _check_group(cls, name, args or {}, config["params"])
            parameters = get_parameters(model, name)
            if parameters:
                groups.append({"params": parameters, "name": name, **(args or {})})
            else:
                threestudio.info(f"optimizer: {name} has no parameters and is left out")
        if not groups:
            raise UserError("nothing to train: no module in optimizer.params has parameters")
    else:
        groups = list(model.parameters())
    try:
        return cls(groups, **(config.get("args") or {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.args do not fit {config['name']}: {error}") from None


def _check_betas(cls: type, args: Any, where: str) -> None:
    """Adam has two and Adan three, of which torch complains late, or not at all."""
    default = inspect.signature(cls).parameters.get("betas")
    wanted = getattr(default, "default", None)
    betas = (args or {}).get("betas")
    if isinstance(wanted, (list, tuple)) and betas is not None and len(betas) != len(wanted):
        raise UserError(f"{where}.betas must be {len(wanted)} numbers, not {betas}")


def _check_group(cls: type, name: str, args: Dict[str, Any], groups: Iterable[str]) -> None:
    """Refuse options of a group that no optimiser reads: torch keeps them without a word. Those of
    another optimiser may stay in a config whose ``optimizer.name`` is replaced."""
    where = f"optimizer.params.{name}"
    known = {*list(inspect.signature(cls).parameters)[1:], *Rates.__annotations__, "initial_lr"}
    for key, value in args.items():
        if key not in known:
            meant = f"{name}.{key}"
            hint = nearest(meant, set(groups) - {name}) if isinstance(value, dict) else ""
            raise UserError(f"{where} has no option {key!r}{hint or nearest(key, known)}")
    _check_betas(cls, args, where)


def _refuse_unknown(keys: Iterable[str], known: Tuple[str, ...], where: str) -> None:
    for key in keys:
        if key not in known:
            hint = nearest(key, known) or f": it has {', '.join(known)}, and all else is in args"
            raise UserError(f"{where} has no option {key!r}{hint}")


def parse_scheduler_to_instance(config: DictConfig, optimizer: torch.optim.Optimizer):
    """The learning-rate scheduler that `config` describes: ``name`` (a class of
    ``torch.optim.lr_scheduler``) and ``args``; or ``SequentialLR`` (``Sequential``) with
    ``schedulers`` and ``milestones``; or ``ChainedScheduler`` with ``schedulers``."""
    config = _primitive(config)
    known = ("name", "args", "interval", "schedulers", "milestones")
    # others may be there to be referred to, as warmup_steps in configurations of upstream
    _refuse_unknown([key for key in config if nearest(key, known)], known, "scheduler")
    name, args = config.get("name"), config.get("args") or {}
    if name in ("SequentialLR", "Sequential", "ChainedScheduler"):
        if not config.get("schedulers"):
            raise UserError(f"scheduler {name} needs a list called schedulers")
        parts = [parse_scheduler_to_instance(part, optimizer) for part in config["schedulers"]]
        if name == "ChainedScheduler":
            return lr_scheduler.ChainedScheduler(parts)
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=config.get("milestones", []))
    cls = getattr(lr_scheduler, str(name), None)
    if not (inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler)):
        every = [
            n
            for n, c in vars(lr_scheduler).items()
            if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)
        ]
        raise UserError(
            f"scheduler.name: torch.optim.lr_scheduler has no {name!r}{nearest(str(name), every)}"
        )
    try:
        return cls(optimizer, **args)
    except TypeError as error:
        raise UserError(f"scheduler.args do not fit {name}: {error}") from None


def parse_scheduler(config: DictConfig, optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """``{"scheduler": ..., "interval": ...}`` for Lightning; ``interval`` is "epoch" (the default)
    or "step"."""
    config = _primitive(config)
    interval = config.get("interval", "epoch")
    if interval not in ("epoch", "step"):
        raise UserError(f"scheduler.interval must be 'epoch' or 'step', not {interval!r}")
    return {"scheduler": parse_scheduler_to_instance(config, optimizer), "interval": interval}
