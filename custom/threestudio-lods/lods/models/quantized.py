"""Frozen weights in 8 or 4 bits (``quantized_weights``), by bitsandbytes, on CUDA."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

NONE, EIGHT, FOUR = "none", "8bit", "4bit"
WORDS = (NONE, EIGHT, FOUR)


def missing(device: torch.device) -> str:
    """Why weights cannot be quantised here; "" if they can."""
    if device.type != "cuda":
        return "needs a CUDA GPU, and the model is on the " + device.type.upper()
    if importlib.util.find_spec("bitsandbytes") is None:
        return "needs bitsandbytes: pip install bitsandbytes"
    return ""


def quantize(network: Any, bits: str, dtype: torch.dtype) -> int:
    """Replace every linear layer of a network on the CPU by bitsandbytes' one with the same
    weights, which become 8 or 4 bits when it is moved to the GPU; returns how many. ``dtype`` is
    that of the computation. Gradients go through to a layer's input. Convolutions, norms and
    embeddings stay as they are."""
    bnb: Any = importlib.import_module("bitsandbytes")

    count = 0
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ not in ("Linear", "LoRACompatibleLinear"):
                continue
            size = layer.in_features, layer.out_features, layer.bias is not None
            if bits == FOUR:
                new = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4", module=new
                )
            else:
                new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(
                    layer.weight.data, requires_grad=False, has_fp16_weights=False
                )
            if layer.bias is not None:
                new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
            setattr(parent, name, new)
            count += 1
    # by which peft knows which of its layers go on top
    setattr(network, f"is_loaded_in_{bits}", True)
    return count
