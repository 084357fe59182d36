"""Ranges of the sections `optimizer` and `scheduler` of a system, for all classes of torch that
they can name. Options that are not here are theirs to judge."""

from typing import Annotated, TypedDict

from threestudio.utils.typing import *

Steps = Annotated[int, "[1, 1e12]"]


class Rates(TypedDict, total=False):
    """Arguments of an optimizer, or of one of its groups of parameters."""

    lr: Annotated[float, "[0, 1e6]"]
    betas: Annotated[Any, "list [0, 1)"]
    eps: Annotated[Any, "each [0, 1e6]"]
    weight_decay: Annotated[float, "[0, 1e6]"]
    momentum: Annotated[float, "[0, 1)"]
    dampening: Annotated[float, "[0, 1]"]
    alpha: Annotated[float, "[0, 1]"]
    rho: Annotated[float, "[0, 1]"]
    lambd: Annotated[float, "[0, 1e6]"]
    t0: Annotated[float, "[0, 1e12]"]
    lr_decay: Annotated[float, "[0, 1e6]"]
    momentum_decay: Annotated[float, "[0, 1e6]"]
    initial_accumulator_value: Annotated[float, "[0, 1e6]"]
    etas: Annotated[Any, "list (0, 1e6]"]
    step_sizes: Annotated[Any, "ordered [0, 1e6]"]
    max_grad_norm: Annotated[float, "[0, inf)"]
    beta2_decay: Annotated[float, "[-10, 0]"]
    d: Annotated[float, "[1, 1e6]"]
    ns_steps: Annotated[int, "[1, 100]"]
    ns_coefficients: Annotated[Any, "list (-inf, inf)"]
    max_iter: Annotated[int, "[1, 1e6]"]
    max_eval: Annotated[Optional[int], "[1, 1e6]"]
    history_size: Annotated[int, "[1, 1e6]"]
    tolerance_grad: Annotated[float, "[0, 1e6]"]
    tolerance_change: Annotated[float, "[0, 1e6]"]


class OptimizerOptions(TypedDict, total=False):
    """See :func:`threestudio.systems.utils.parse_optimizer`."""

    args: Optional[Rates]
    params: Optional[Dict[str, Optional[Rates]]]


class ScheduleArguments(TypedDict, total=False):
    """Arguments of the classes of ``torch.optim.lr_scheduler``."""

    gamma: Annotated[float, "(0, 1e6]"]
    step_size: Steps
    milestones: Annotated[Any, "whole ordered [0, 1e12]"]
    start_factor: Annotated[float, "(0, 1]"]
    end_factor: Annotated[float, "[0, 1]"]
    factor: Annotated[float, "[0, 1]"]
    total_iters: Annotated[int, "[0, 1e12]"]
    total_steps: Annotated[Optional[int], "[1, 1e12]"]
    T_max: Steps
    T_0: Steps
    T_mult: Steps
    eta_min: Annotated[float, "[0, 1e6]"]
    power: Annotated[float, "[0, 1e6]"]
    max_lr: Annotated[Any, "each (0, 1e6]"]
    base_lr: Annotated[Any, "each (0, 1e6]"]
    min_lr: Annotated[Any, "each [0, 1e6]"]
    patience: Annotated[int, "[0, 1e12]"]
    cooldown: Annotated[int, "[0, 1e12]"]
    last_epoch: Annotated[int, "[-1, 1e12]"]
    threshold: Annotated[float, "[0, 1e6]"]
    eps: Annotated[float, "[0, 1e6]"]
    step_size_up: Steps
    step_size_down: Annotated[Optional[int], "[1, 1e12]"]
    base_momentum: Annotated[Any, "each [0, 1]"]
    max_momentum: Annotated[Any, "each [0, 1]"]
    epochs: Annotated[Optional[int], "[1, 1e12]"]
    steps_per_epoch: Annotated[Optional[int], "[1, 1e12]"]
    pct_start: Annotated[float, "[0, 1]"]
    div_factor: Annotated[float, "(0, 1e12]"]
    final_div_factor: Annotated[float, "(0, 1e12]"]


class SchedulerPart(TypedDict, total=False):
    """One of the schedulers that follow each other, or act together."""

    args: Optional[ScheduleArguments]


class SchedulerOptions(TypedDict, total=False):
    """See :func:`threestudio.systems.utils.parse_scheduler`."""

    args: Optional[ScheduleArguments]
    milestones: Annotated[Any, "whole ordered [0, 1e12]"]
    schedulers: List[SchedulerPart]
