"""Learning rates that change over the steps."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from lods.threestudio.systems.base import LODSSystem
from lods.threestudio.systems.strategy_options import Rates

from threestudio.utils.misc import C


class ScheduledRates(LODSSystem):
    """A system of explicit parameters, whose groups of the optimizer may have schedules."""

    @dataclass
    class Config(LODSSystem.Config):
        # name of an optimizer group -> schedule of its learning rate, interpolated geometrically
        # (log-linear); groups that are not listed keep their 'lr'
        lr_schedule: Annotated[dict, Rates] = field(default_factory=dict)

        def contradictions(self):
            """Fields that do not go together: (field, what is wrong)."""
            for name, rates in self.lr_schedule.items():
                if isinstance(rates, (int, float)):
                    continue
                if any(C(rates, 0, step) <= 0 for step in rates if isinstance(step, int)):
                    yield (
                        f"lr_schedule.{name}",
                        "goes to 0, which a geometric schedule never reaches: end it above 0",
                    )

    cfg: Config

    def on_fit_start(self) -> None:
        super().on_fit_start()
        names = [group.get("name") for group in self._optimizer.param_groups]
        for name in self.cfg.lr_schedule:
            if name not in names:
                raise ValueError(
                    f"system.lr_schedule names '{name}', which is not in system.optimizer.params "
                    f"({', '.join(str(n) for n in names)})"
                )

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers(use_pl_optimizer=False)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """Set the scheduled learning rates, and step."""
        for group in optimizer.param_groups:
            if group.get("name") in self.cfg.lr_schedule:
                group["lr"] = C(
                    self.cfg.lr_schedule[group["name"]],
                    self.true_current_epoch,
                    self.true_global_step,
                    interpolation="exp",
                )
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
