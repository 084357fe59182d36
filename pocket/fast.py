"""The fastest way to train a diffusers network on the device at hand, undone before it is saved.

On a CPU that multiplies matrices in bfloat16 (AMX or AVX-512 BF16) training in bfloat16 takes half
the time of float32, but only without two operations that are slower in it: the backward pass of
fused attention, and group norm. So attention is computed in the plain way and group norm in
float32. Nothing is changed but the network given: no class, no other network.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn

from pocket.tools import multiplies_in_bfloat16, norm_in_float32


def autocast(device: str = "cpu"):
    """A context in which networks compute in bfloat16 where that pays."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=multiplies_in_bfloat16(device))


@contextlib.contextmanager
def fast(network, device: str = "cpu") -> Iterator[None]:
    """Within the block ``network``, a diffusers model, lies in channels-last order on ``device``;
    on a CPU its attention is the plain one and its group norms compute in float32. Afterwards
    forward functions and attention processors are those that it had."""
    network.to(device, memory_format=torch.channels_last)
    if torch.device(device).type != "cpu":
        yield
        return
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    processors = getattr(network, "attn_processors", {})
    # joint attention, of image and text, keeps its own
    plain = bool(processors) and all(
        isinstance(p, (AttnProcessor, AttnProcessor2_0)) for p in processors.values()
    )
    try:
        if plain:
            network.set_attn_processor(AttnProcessor())
        for norm in norms:
            norm.__dict__["forward"] = functools.partial(norm_in_float32, norm)
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)
        if plain:
            network.set_attn_processor(dict(processors))
