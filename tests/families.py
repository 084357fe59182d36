"""The model families that every method is tried on, each as a tiny random model, and how stock
diffusers loads one with a LoRA."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny_flows, tiny_masked, tiny_models


@dataclass(frozen=True)
class Family:
    """``make(folder, **options)`` writes a model; ``pipeline`` is its class in diffusers, loaded
    with ``without`` in place of parts that are not there."""

    title: str
    make: Callable[..., Path]
    pipeline: str
    options: dict[str, Any] = field(default_factory=dict)
    without: dict[str, Any] = field(default_factory=dict)

    def network_with_lora(self, folder: str, path: Path) -> Any:
        """The network of the stock pipeline, with the LoRA in the file."""
        import diffusers

        pipeline = getattr(diffusers, self.pipeline).from_pretrained(folder, **self.without)
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        else:
            load_with_peft(pipeline.transformer, path)
        return getattr(pipeline, "unet", None) or pipeline.transformer


def load_with_peft(transformer: Any, path: Path) -> None:
    """A LoRA into a transformer whose pipeline has no ``load_lora_weights``: PixArt's."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    rank = next(v.shape[0] for k, v in weights.items() if k.endswith("lora_A.weight"))
    targets = sorted({k.rsplit(".lora_", 1)[0] for k in weights})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    inject_adapter_in_model(config, transformer)
    found = set_peft_model_state_dict(transformer, weights)
    assert not found.unexpected_keys


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
FAMILIES = {
    "sd": Family("Stable Diffusion", tiny_models.make_tiny_sd, "StableDiffusionPipeline"),
    "sdxl": Family("SDXL", tiny_models.make_tiny_sd, "StableDiffusionXLPipeline", {"kind": "sdxl"}),
    "sd3": Family("SD3", tiny_models.make_tiny_sd3, "StableDiffusion3Pipeline", {"t5": 0}, NO_T5),
    "flux": Family("FLUX.1", tiny_flows.write_flux, "FluxPipeline"),
    "flux2": Family("FLUX.2 [klein] base", tiny_flows.write_flux2, "Flux2KleinPipeline"),
    "zimage": Family("Z-Image", tiny_flows.write_zimage, "ZImagePipeline"),
    "qwen": Family("Qwen-Image", tiny_flows.write_qwen, "QwenImagePipeline"),
    "sana": Family("SANA", tiny_masked.write_sana, "SanaPipeline"),
    "pixart": Family("PixArt-Sigma", tiny_masked.write_pixart, "PixArtSigmaPipeline"),
}
