"""The published layout of MVDream's UNet, in the names of diffusers' ``UNet2DConditionModel``.

``unet/config.json`` of ``ashawkey/mvdream-sd2.1-diffusers`` (MultiViewUNetModel) has the fields of
the UNet of the first Stable Diffusion code, and its weights have the names of that:

    input_blocks.{n}     n = 0 is the first convolution; then, level by level, ``num_res_blocks`` of
                         .0 a residual block and, where there is attention, .1 a transformer; and
                         between levels one with .0.op, a convolution that halves the picture
    middle_block         .0 and .2 residual blocks, .1 a transformer
    output_blocks.{n}    level by level from the last, ``num_res_blocks`` + 1 of .0 and .1 as above;
                         the last of a level, but of the first level, ends with one that has .conv
    time_embed, camera_embed, out
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

MOST = 16  # levels, and blocks of a level
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "camera_embed.0": "class_embedding.linear_1",
    "camera_embed.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
WHOLE = ("image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks",
         "num_head_channels", "context_dim", "camera_dim")  # fmt: skip


def fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of diffusers' class for a published config. Raises ``ValueError``, one line, for
    one that is damaged, and for a model that is told a picture (ImageDream's ``ip_dim``)."""
    if config.get("ip_dim"):
        raise ValueError(
            f"the unet of {where!r} is told a picture beside the text (ip_dim, as of ImageDream), "
            "which methods of this library have none of: take mvdream-sd21"
        )
    depth = config.get("transformer_depth", 1)
    for name, value in [
        *((name, config.get(name)) for name in WHOLE),
        ("transformer_depth", depth),
    ]:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65_536:
            raise ValueError(_damaged(where, name, value))
    factors: Any = config.get("channel_mult")
    at: Any = config.get("attention_resolutions")
    for name, value in (("channel_mult", factors), ("attention_resolutions", at)):
        whole = isinstance(value, list) and all(type(each) is int and each > 0 for each in value)
        if not whole or not 1 <= len(value) <= MOST:
            raise ValueError(_damaged(where, name, value))
    if config["num_res_blocks"] > MOST:
        raise ValueError(_damaged(where, "num_res_blocks", config["num_res_blocks"]))
    channels = [config["model_channels"] * factor for factor in factors]
    attention = [2**level in at for level in range(len(channels))]
    return {
        "sample_size": config["image_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": config["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
        "cross_attention_dim": config["context_dim"],
        # diffusers' name for the number of heads
        "attention_head_dim": [each // config["num_head_channels"] or 1 for each in channels],
        "transformer_layers_per_block": depth,
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": config["camera_dim"],
    }


def _damaged(where: str, name: str, value: Any) -> str:
    return f"the unet of {where!r} has {name}={str(value)[:30]}: the model folder is damaged"


def prefixes(fields: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(published prefix, diffusers' prefix, names within) of all blocks."""
    levels, layers = len(fields["block_out_channels"]), fields["layers_per_block"]
    down = ["CrossAttn" in kind for kind in fields["down_block_types"]]
    up = ["CrossAttn" in kind for kind in fields["up_block_types"]]
    for level in range(levels):
        start = 1 + level * (layers + 1)
        for j in range(layers):
            yield f"input_blocks.{start + j}.0", f"down_blocks.{level}.resnets.{j}", RESIDUAL
            if down[level]:
                yield f"input_blocks.{start + j}.1", f"down_blocks.{level}.attentions.{j}", {}
        if level < levels - 1:
            halves = f"down_blocks.{level}.downsamplers.0.conv"
            yield f"input_blocks.{start + layers}.0.op", halves, {}
    for j in range(2):
        yield f"middle_block.{2 * j}", f"mid_block.resnets.{j}", RESIDUAL
    yield "middle_block.1", "mid_block.attentions.0", {}
    for level in range(levels):
        for j in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + j}"
            yield f"{block}.0", f"up_blocks.{level}.resnets.{j}", RESIDUAL
            if up[level]:
                yield f"{block}.1", f"up_blocks.{level}.attentions.{j}", {}
            if j == layers and level < levels - 1:
                doubles = f"up_blocks.{level}.upsamplers.0.conv"
                yield f"{block}.{1 + up[level]}.conv", doubles, {}


def renamed(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under diffusers' names; one whose name is not known keeps its own."""
    inner = {old: (new, within) for old, new, within in prefixes(fields)}
    return {_name(key, inner): value for key, value in tensors.items()}


def _name(key: str, inner: Mapping[str, Any]) -> str:
    module, _, leaf = key.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{leaf}"
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        block = ".".join(parts[:length])
        if block in inner:
            prefix, within = inner[block]
            rest = ".".join(parts[length:])
            if within:
                rest = within.get(rest, rest)
            return ".".join(filter(None, (prefix, rest, leaf)))
    return key
