"""Bases of everything in the registry: configured objects, modules, and their updates."""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from threestudio.utils.config import parse_structured
from threestudio.utils.misc import get_device, load_module_weights, loading_weights
from threestudio.utils.typing import *


class Configurable:
    """An object that only parses its `cfg`."""

    @dataclass
    class Config:
        pass

    def __init__(self, cfg: Optional[dict] = None) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)


@functools.cache
def _class_names(cls: type) -> Tuple[str, ...]:
    """Public names on the class whose values can be Updateable: properties and the like.

    What torch and Lightning define is left out: a LightningModule has dozens of properties, some
    of which raise, and reading them at every step is what made this walk slow.
    """
    names = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in ("torch", "pytorch_lightning", "lightning_fabric"):
            continue
        for name, value in vars(base).items():
            if isinstance(value, Updateable):
                names.add(name)
            elif hasattr(value, "__get__") and not callable(value):
                names.add(name)  # a property or another descriptor
            if name.startswith("_") or isinstance(value, (staticmethod, classmethod)):
                names.discard(name)
    return tuple(sorted(names))


class Updateable:
    """Something with hooks before and after each training step.

    ``do_update_step`` first visits every attribute that is Updateable (public names in alphabetic
    order; properties are read, those that raise are skipped; containers are not entered), then
    calls the object's own ``update_step``. An object that is reachable twice is updated twice, so
    an update must be idempotent within a step.
    """

    def _updateable_children(self) -> List["Updateable"]:
        found = {}
        own = vars(self)
        for attributes in (own, own.get("_modules") or {}):
            for name, value in attributes.items():
                if isinstance(value, Updateable) and not name.startswith("_"):
                    found[name] = value
        for name in _class_names(type(self)):
            if name not in found and name not in own:
                try:
                    value = getattr(self, name)
                except Exception:  # a property that is not ready yet has nothing to update
                    continue
                if isinstance(value, Updateable):
                    found[name] = value
        return [found[name] for name in sorted(found)]

    def do_update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Call ``update_step`` on all children, then on this object."""
        for child in self._updateable_children():
            child.do_update_step(epoch, global_step, on_load_weights=on_load_weights)
        self.update_step(epoch, global_step, on_load_weights=on_load_weights)

    def do_update_step_end(self, epoch: int, global_step: int) -> None:
        """Call ``update_step_end`` on all children, then on this object."""
        for child in self._updateable_children():
            child.do_update_step_end(epoch, global_step)
        self.update_step_end(epoch, global_step)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Override: what changes with the step. With `on_load_weights` the weights of that step
        have just been loaded and no training goes on."""

    def update_step_end(self, epoch: int, global_step: int) -> None:
        """Override: what is due after the step."""


def update_if_possible(module: Any, epoch: int, global_step: int) -> None:
    """``do_update_step`` if `module` has it."""
    if isinstance(module, Updateable):
        module.do_update_step(epoch, global_step)


def update_end_if_possible(module: Any, epoch: int, global_step: int) -> None:
    """``do_update_step_end`` if `module` has it."""
    if isinstance(module, Updateable):
        module.do_update_step_end(epoch, global_step)


class BaseObject(Updateable):
    """A configured object without parameters: parses `cfg`, then calls ``configure``."""

    @dataclass
    class Config:
        pass

    cfg: Config

    def __init__(self, cfg: Optional[Union[dict, DictConfig]] = None, *args, **kwargs) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self.device = get_device()
        self.configure(*args, **kwargs)

    def configure(self, *args, **kwargs) -> None:
        """Override: what a constructor would do."""


class BaseModule(nn.Module, Updateable):
    """A configured ``nn.Module``. `weights` ("path/to.ckpt:module.prefix") loads that part of a
    checkpoint (strictly) after ``configure`` and updates to the checkpoint's step."""

    @dataclass
    class Config:
        weights: Optional[str] = None

    cfg: Config

    def __init__(self, cfg: Optional[Union[dict, DictConfig]] = None, *args, **kwargs) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self.device = get_device()
        self.configure(*args, **kwargs)
        if self.cfg.weights is not None:
            path, colon, module_name = self.cfg.weights.rpartition(":")  # a path may hold colons
            if not colon:
                raise ValueError(f"weights={self.cfg.weights!r}: write path/to.ckpt:module.name")
            state, epoch, global_step = load_module_weights(
                path, module_name=module_name, map_location="cpu"
            )
            with loading_weights(self, state, self.cfg.weights):
                self.load_state_dict(state)
            self.do_update_step(epoch, global_step, on_load_weights=True)
        # tells on which device the module's weights are, also for a module without any
        self.register_buffer("_dummy", torch.zeros(0), persistent=False)

    def configure(self, *args, **kwargs) -> None:
        """Override: what a constructor would do."""
