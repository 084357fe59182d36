"""Muon for the weight matrices of a network, AdamW for the rest of its parameters.

Muon's step is the momentum of the gradient with all its singular values made about 1 (a
Newton-Schulz iteration), times 0.2 sqrt(max(rows, columns)), which gives it the size of a step of
AdamW at the same rate (Jordan et al., https://kellerjordan.github.io/posts/muon; the factor is
Moonlight's, arXiv 2502.16982). The weights of a convolution are the matrix (outputs, inputs times
kernel). Tables of embeddings, the first and the last layer, biases and norms are AdamW's.
"""

from typing import Any

import torch
from torch import nn

SMALLEST = 32  # rows or columns: a narrower matrix is left to AdamW
ENDS = ("conv_in", "conv_out", "pos_embed", "proj_out", "embed_tokens")  # of a network


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon takes the parameter of this name."""
    wide = parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= SMALLEST
    return wide and "embedding" not in name and not any(end in name for end in ENDS)


def _flat(weight: torch.Tensor) -> torch.Tensor:
    """A view (rows, columns) of a weight: of a convolution in channels-last order, too."""
    if weight.ndim == 4 and not weight.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)
    return weight.view(len(weight), -1)


class MuonAndAdamW:
    """Steps the parameters of ``models`` that want a gradient. It has what a training loop uses of
    an optimizer: ``param_groups``, ``zero_grad``, ``step``, ``state_dict`` and
    ``load_state_dict``; parameters without a gradient are left alone."""

    def __init__(
        self, models: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
    ):
        named = [(k, p) for k, p in models.named_parameters() if p.requires_grad]
        self.matrices = [p for k, p in named if is_matrix(k, p)]
        rest = [p for k, p in named if not is_matrix(k, p)]
        self.views = [nn.Parameter(_flat(p.data)) for p in self.matrices]
        self.parts: dict[str, torch.optim.Optimizer] = {}  # of those that have parameters
        if self.views:
            self.parts["muon"] = torch.optim.Muon(
                self.views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        if rest:
            self.parts["adamw"] = torch.optim.AdamW(
                rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True
            )
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def zero_grad(self) -> None:
        for parameter in self.matrices:
            parameter.grad = None
        if "adamw" in self.parts:
            self.parts["adamw"].zero_grad()

    def step(self) -> None:
        for parameter, view in zip(self.matrices, self.views, strict=True):
            if view.data_ptr() != parameter.data_ptr():
                raise RuntimeError("the network was moved after its optimizer was made")
            grad = parameter.grad
            if grad is not None and grad.stride() != parameter.stride():
                grad = torch.empty_like(parameter).copy_(grad)
            view.grad = None if grad is None else _flat(grad)
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of this class. One of AdamW alone is left: both parts start anew then."""
        if state.keys() != self.parts.keys():
            return
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]
