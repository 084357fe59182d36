"""Weights of a model in one file, converted by diffusers to its own names."""

import json
from pathlib import Path
from typing import Any

import torch
from lods import log
from lods.models import checkpoint
from lods.models.checkpoint import Checkpoint
from lods.models.checkpoint_layout import OPEN_CLIP, XL_OPEN_CLIP
from lods.models.checkpoint_parts import NETWORK, VAE, Text
from lods.models.files import only_errors
from torch import Tensor, nn

PREFIXES = {"unet": NETWORK, "transformer": NETWORK, "vae": VAE}
# correlation of a network's output with the noise that it is given, above which it predicts noise:
# one that predicts v = alpha eps - sigma z hardly follows noise where alpha is nearly 0
FOLLOWS = 0.5
ASKED_SIZE = 16  # of the latents with which it is asked


def load_part(cls: Any, found: Checkpoint, part: str, dtype: torch.dtype | None = None) -> Any:
    """The network of the subfolder ``part``, an instance of ``cls``. Raises ``ValueError``, one
    line, if the file lacks some of its weights."""
    text = next((text for text in found.layout.texts if text.part == part), None)
    try:
        if text is None:
            tensors = _tensors(found.path, PREFIXES[part])
            with only_errors():  # and no warnings of the original code's buffers
                network = cls.from_single_file(
                    tensors,
                    config=found.folder,
                    subfolder=part,
                    torch_dtype=dtype or torch.float32,
                    local_files_only=True,
                )
        else:
            network = _load_text(cls, found, text, dtype or torch.float32)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds, by library and by version
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(
            f"{found.path!r} is incomplete, or its {part} is not as {found.layout.family}'s is "
            f"({why})"
        ) from None
    lost = [name for name, value in network.named_parameters() if value.is_meta]
    if lost:
        raise ValueError(
            f"{found.path!r} is incomplete: {len(lost)} tensors of its {part} are missing, the "
            f"first of them {lost[0]}"
        )
    return network


def _load_text(cls: Any, found: Checkpoint, text: Text, dtype: torch.dtype) -> nn.Module:
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    tensors = _tensors(found.path, text.prefix)
    if text.prefix in (OPEN_CLIP, XL_OPEN_CLIP):
        blocks = f"{text.prefix}transformer.resblocks."
        unused = {f"{blocks}{i}." for i in range(text.layers, text.layers + 2)}
        tensors = {k: v for k, v in tensors.items() if not k.startswith(tuple(unused))}
    with only_errors():
        return create_diffusers_clip_model_from_ldm(
            cls,
            tensors,
            subfolder=text.part,
            config=found.folder,
            torch_dtype=dtype,
            local_files_only=True,
        )


def _tensors(path: str, prefix: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path!r} cannot be read as safetensors: {error}") from None


def settle(found: Checkpoint, network: Any, asked: str = "auto") -> None:
    """Write into the checkpoint's folder what the network predicts, and give it the size of picture
    that goes with it: as it is ``asked`` for, else as the file says, else as the network shows. Of
    a flow there is nothing to settle; what is left out of the file is told."""
    if found.layout.note:
        log.info(f"model: {found.path}: {found.layout.note}")
    if found.prediction == "flow":
        return
    kind = found.prediction if asked == "auto" else asked
    if kind is None:
        shared = ask(network)
        kind = checkpoint.PREDICTIONS[shared < FOLLOWS]
        log.info(
            f"model: {found.path} is taken for one that predicts {kind} (asked at the last "
            f"timestep, its output has a correlation of {shared:.2f} with the noise): set "
            "model_prediction if that is wrong"
        )
    pixels = found.pixels or found.layout.image_size[kind]
    network.register_to_config(sample_size=checkpoint.latent_size(found.layout, pixels))
    file = Path(found.folder, "scheduler", "scheduler_config.json")
    config = {**found.layout.configs["scheduler"], "prediction_type": kind}
    file.write_text(json.dumps(config), encoding="utf-8")


@torch.no_grad()
def ask(unet: Any) -> float:
    """The correlation of a UNet's output with its input, noise, at the last of 1,000 timesteps,
    under a text of zeros. Of a trained network that predicts noise it is near 1."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, ASKED_SIZE, ASKED_SIZE, generator=generator)
    text = torch.zeros(1, 1, unet.config.cross_attention_dim)
    given = noise.to(unet.dtype), torch.tensor([999]), text.to(unet.dtype)
    output = unet(*given[:2], encoder_hidden_states=given[2]).sample.float()
    if not output.isfinite().all():
        return 1.0
    return float(torch.corrcoef(torch.stack([noise.flatten(), output.flatten()]))[0, 1])
