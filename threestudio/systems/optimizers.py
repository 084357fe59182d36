"""Optimisers that torch does not have."""

import torch

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *


class Adan(torch.optim.Optimizer):
    """Adaptive Nesterov momentum (arXiv:2208.06677, algorithm 1), with the paper's 1 - beta called
    beta, as in Adam. With d = g_k - g_{k-1} (0 at the first step) and k counted from 1:

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) d        n = b3 n + (1 - b3) (g + b2 d)^2
        u = (m / (1 - b1^k) + b2 v / (1 - b2^k)) / (sqrt(n / (1 - b3^k)) + eps)
        x = (x - lr u) / (1 + lr weight_decay),   or with `no_prox`  (1 - lr weight_decay) x - lr u

    Divided by 1 - b^k are the averages, which start at 0 (the paper's algorithm starts them at the
    first gradient instead).

    `max_grad_norm` above 0: g is first scaled down so that all gradients together have at most
    that norm. `foreach`: all parameters at once (faster, more memory), else one after the other.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: Tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        no_prox: bool = False,
        foreach: bool = True,
    ) -> None:
        if len(betas) != 3 or not all(0 <= b < 1 for b in betas):
            raise UserError(f"Adan takes three betas within [0, 1), not {list(betas)}")
        for name in ("lr", "eps", "weight_decay", "max_grad_norm"):
            if not locals()[name] >= 0:
                raise UserError(f"Adan: {name} must not be negative, as {locals()[name]} is")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "no_prox": no_prox,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Optional[Callable] = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = self._grad_norm()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            most = group["max_grad_norm"]
            scale = (most / (norm + group["eps"])).clamp(max=1) if most > 0 else None
            together: Dict[int, list] = {}  # by number of steps, which the corrections depend on
            for p in params:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p)
                state["step"] += 1
                together.setdefault(state["step"], []).append(p)
            for k, some in together.items():
                for part in [some] if group["foreach"] else [[p] for p in some]:
                    self._update(part, k, group, scale)
        return loss

    def _grad_norm(self) -> Optional[Float[Tensor, ""]]:
        if not any(group["max_grad_norm"] > 0 for group in self.param_groups):
            return None
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms = [n.float() for n in torch._foreach_norm(grads)]
        return torch.stack([n.to(norms[0].device) for n in norms]).norm()

    def _update(self, params: List[Tensor], k: int, group: dict, scale: Optional[Tensor]) -> None:
        b1, b2, b3 = group["betas"]
        lr, decay = group["lr"], group["weight_decay"]
        states = [self.state[p] for p in params]
        m, v, n = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq"))
        g = [p.grad if scale is None else p.grad * scale.to(p.grad) for p in params]
        d = torch._foreach_sub(g, [s.get("previous_grad", x) for s, x in zip(states, g)])
        for state, x in zip(states, g):
            state["previous_grad"] = x.clone()
        torch._foreach_lerp_(m, g, 1 - b1)
        torch._foreach_lerp_(v, d, 1 - b2)
        ahead = torch._foreach_add(g, d, alpha=b2)
        torch._foreach_mul_(n, b3)
        torch._foreach_addcmul_(n, ahead, ahead, value=1 - b3)

        u = torch._foreach_div(m, 1 - b1**k)
        torch._foreach_add_(u, torch._foreach_mul(v, b2 / (1 - b2**k)))
        root = torch._foreach_sqrt(torch._foreach_div(n, 1 - b3**k))
        torch._foreach_add_(root, group["eps"])
        if group["no_prox"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_addcdiv_(params, u, root, value=-lr)
        if not group["no_prox"]:
            torch._foreach_div_(params, 1 + lr * decay)


def fused_adam() -> type:
    """The class ``FusedAdam`` of NVIDIA apex. Raises :class:`UserError` where apex is absent."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            f"optimizer.name=FusedAdam needs NVIDIA apex, which is built from source ({error}): "
            "use Adam with args.fused=true (on CUDA), or AdamW"
        ) from None
    return FusedAdam
