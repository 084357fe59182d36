"""NaN and infinity, noticed within the step that they appear in."""

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

import threestudio
from threestudio.utils.errors import StoppedError, UserError, nearest

POLICIES = ("stop", "skip")
_NAMED = 5  # tensors in a report


class NonFiniteGuard(Callback):
    """Keeps what is not finite out of parameters, optimizer and checkpoints.

    Before every optimizer step (of automatic and manual optimisation, once per accumulated batch)
    it looks at the loss and at the gradients; after the batch, before checkpoints are written, at
    the optimizers' parameters.

    ``policy`` "stop": a :class:`StoppedError` that names the tensors, before the step is taken.
    "skip": the gradients are dropped, so that parameters and the optimizer's state stay as they
    are, and the step counts as done; after `patience` in a row of one optimizer the run stops.
    Under fp16 loss scaling an overflow is ordinary, the scaler skips the step itself: there "stop"
    too has that patience. A parameter that the step itself made not finite always stops the run.

    A system names the parts of its loss in its dict ``loss_terms`` (name -> detached tensor).
    """

    def __init__(self, policy: str = "stop", patience: int = 20) -> None:
        if policy not in POLICIES:
            hint = nearest(policy, POLICIES) or f": choose {' or '.join(POLICIES)}"
            raise UserError(f"system.on_nonfinite={policy!r} is unknown{hint}")
        if patience < 1:
            raise UserError(f"system.max_skipped_steps must be at least 1, not {patience}")
        self.policy, self.patience = policy, patience
        self.skipped = 0  # steps of the whole run
        self._in_a_row: dict[str, int] = {}  # optimizer's number -> its skipped steps
        self._loss: Tensor | None = None  # of all batches since the last step
        self._stepped = False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self.skipped = int(state["skipped"])
            self._in_a_row = {str(k): int(n) for k, n in state["in_a_row"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"the checkpoint's count of skipped steps is damaged: {state}"
            ) from None

    # --- the moments of a step ------------------------------------------------------------------

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self._stepped:  # a bad loss is remembered until its gradients are done with
            self._loss, self._stepped = None, False

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        # looked at with the gradients: asking twice would make a GPU wait twice
        value = loss.detach().sum()
        self._loss = value if self._loss is None else self._loss + value

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self._stepped = True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        losses = [] if self._loss is None else [self._loss]
        good = all_finite([*losses, *(p.grad for p in parameters if p.grad is not None)])
        if trainer.world_size > 1:  # a loss is one process's own; all must do the same
            good = trainer.strategy.reduce_boolean_decision(good, all=True)
        number = str(next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), 0))
        if good:
            self._in_a_row.pop(number, None)
            return
        report = self._report(pl_module, parameters)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        report += f" at step {trainer.global_step}"
        in_a_row = self._in_a_row[number] = self._in_a_row.get(number, 0) + 1
        if self.policy == "stop" and not (scaled and in_a_row < self.patience):
            raise StoppedError(
                f"{report}: the run stops here; lower the learning rates or loss weights, or set "
                "system.on_nonfinite=skip to leave such steps out"
            )
        if in_a_row >= self.patience:
            raise StoppedError(
                f"{report}: the run stops after {in_a_row} skipped steps in a row "
                "(system.max_skipped_steps); lower the learning rates or loss weights"
            )
        self.skipped += 1
        if not scaled and in_a_row == 1:
            threestudio.warn(f"{report}: this step is skipped")
        elif scaled and self.skipped == 1:
            threestudio.info(
                f"{report}: the scaled loss was too large for float16, which is ordinary in the "
                "first steps; the step is skipped, and the loss is scaled less from now on"
            )
        for parameter in parameters:
            parameter.grad = None  # optimizers pass over a parameter without gradient

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        parameters = [
            p for o in trainer.optimizers for group in o.param_groups for p in group["params"]
        ]
        # a system that steps its optimizers itself, behind Lightning's back, is only seen here
        self._stepped |= not pl_module.automatic_optimization
        if self._stepped and not all_finite(parameters):
            report = _describe(_named(pl_module, parameters))
            raise StoppedError(
                f"parameters are not finite: {report} after step {trainer.global_step}: the run "
                "stops here; lower the learning rates"
            )

    def _report(self, pl_module, parameters: list[Tensor]) -> str:
        if self._loss is not None and not _is_finite(self._loss):
            terms = {k: v for k, v in pl_module.loss_terms.items() if not _is_finite(v)}
            parts = ", ".join(f"{name} is {float(value)}" for name, value in terms.items())
            return f"the loss became {float(self._loss)}" + (f" ({parts})" if parts else "")
        gradients = [(n, p.grad) for n, p in _named(pl_module, parameters) if p.grad is not None]
        where = _describe(gradients) or "in another process"
        return f"gradients are not finite: {where}"

    def on_train_end(self, trainer, pl_module) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self.skipped and (self.policy == "skip" or scaled):
            threestudio.warn(f"{self.skipped} steps were skipped because of values not finite")


@torch.no_grad()
def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no element of any tensor is NaN or infinite. One pass over the memory and one
    synchronisation: the norms first, element by element only where one of them overflows."""
    tensors = [_values(t) for t in tensors]
    tensors = [t for t in tensors if t.numel() and t.is_floating_point()]
    if not tensors:
        return True
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    sums = [torch.stack(torch._foreach_norm(same)).float().sum() for same in kinds.values()]
    total = sums[0] if len(sums) == 1 else torch.stack([s.to(sums[0].device) for s in sums]).sum()
    return bool(torch.isfinite(total)) or all(_is_finite(t) for t in tensors)


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _is_finite(value: Any) -> bool:
    return bool(torch.isfinite(torch.as_tensor(value).detach()).all())


def _named(pl_module, parameters: list[Tensor]) -> Iterable[tuple[str, Tensor]]:
    names = {id(p): name for name, p in pl_module.named_parameters()}
    return [(names.get(id(p), "a parameter"), p) for p in parameters]


def _describe(tensors: Iterable[tuple[str, Tensor]]) -> str:
    found = []
    for name, tensor in tensors:
        bad = int((~torch.isfinite(_values(tensor.detach()))).sum())
        if bad:
            found.append(f"{name} ({bad} of {tensor.numel()} elements)")
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more
