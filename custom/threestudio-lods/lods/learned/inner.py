"""Updates of a learned part that its method makes within a step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class InnerAdam(nn.Module):
    """Adam (arXiv:1412.6980) on ``parameters``, which stay their owner's. Its state is buffers,
    so that it is part of the owner's ``state_dict`` and a resumed run goes on with it."""

    def __init__(self, parameters, lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        super().__init__()
        self.learned = tuple(parameters)  # in a tuple they are not registered a second time
        self.lr, self.betas, self.eps = lr, betas, eps
        device = self.learned[0].device
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        for i, parameter in enumerate(self.learned):
            self.register_buffer(f"mean_{i}", torch.zeros_like(parameter))
            self.register_buffer(f"square_{i}", torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, loss_gradients: Iterable[Tensor]) -> None:
        """One update; elements of a gradient that are not finite count as 0."""
        self.count += 1
        one, two = (1 - beta**self.count for beta in self.betas)
        for i, (parameter, grad) in enumerate(zip(self.learned, loss_gradients)):
            grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
            mean, square = getattr(self, f"mean_{i}"), getattr(self, f"square_{i}")
            mean.lerp_(grad, 1 - self.betas[0])
            square.lerp_(grad * grad, 1 - self.betas[1])
            parameter.sub_(self.lr * (mean / one) / ((square / two).sqrt() + self.eps))
