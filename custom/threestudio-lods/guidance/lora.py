"""LoRA on the attention of a UNet, with a strength of its own for every row of a batch."""

import contextlib
from pathlib import Path

from torch import nn

from threestudio.utils.typing import *

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class RowLora(nn.Module):
    """Low-rank updates (arXiv:2106.09685) of a UNet's attention projections, injected by peft:

    row b of a projection gives  W x_b + r_b B A x_b,  with A (rank, in) ~ N(0, 1/rank^2), B
    (out, rank) zero at first, both float32, and r_b the row's strength, set by :meth:`strength`
    for the calls within it and 0 outside: there the UNet is what it was.

    The parameters are named as in the UNet (``down_blocks.0...to_q.lora_A.weight``); the UNet
    itself is not part of this module.
    """

    def __init__(self, unet: nn.Module, rank: int = 4):
        super().__init__()
        if rank < 1:
            raise ValueError(f"lora_rank must be at least 1, not {rank}")
        from peft import LoraConfig, inject_adapter_in_model

        # lora_alpha = r: peft's own factor is 1, the strength is ours alone.
        config = LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
        )
        inject_adapter_in_model(config, unet)
        self._strength: Union[float, Tensor] = 0.0
        for name, layer in list(unet.named_modules()):
            if hasattr(layer, "lora_A"):
                for part in ("lora_A", "lora_B"):
                    # peft makes them in the UNet's dtype; half precision would lose the updates
                    self._enter(f"{name}.{part}", getattr(layer, part)["default"].float())
                layer.lora_B["default"].register_forward_hook(self._scale)

    def _enter(self, path: str, leaf: nn.Module) -> None:
        *parents, last = path.split(".")
        node: nn.Module = self
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(last, leaf)

    def _scale(self, module, inputs, output: Tensor) -> Tensor:
        if isinstance(self._strength, Tensor):
            return output * self._strength.view(-1, *[1] * (output.ndim - 1))
        return output * self._strength

    @contextlib.contextmanager
    def strength(self, rows: Union[float, Float[Tensor, "B"]]):
        """Within this, the UNet's calls use these strengths, one for all rows or one for each."""
        before, self._strength = self._strength, rows
        try:
            yield
        finally:
            self._strength = before

    def save(self, path, strength: float, metadata: Dict[str, str]) -> Path:
        """Write a LoRA that ``StableDiffusionPipeline.load_lora_weights`` reads; at its default
        weight of 1 it acts with ``strength``, which is multiplied into B here."""
        from safetensors.torch import save_file

        tensors = {}
        for name, value in self.state_dict().items():
            factor = strength if name.endswith("lora_B.weight") else 1.0
            tensors[f"unet.{name}"] = (value.detach().float().cpu() * factor).contiguous()
        save_file(tensors, path, metadata={"format": "pt", **metadata})
        return Path(path)
