"""What trades memory for time in a frozen model, and time for patience: nothing here changes a
result beyond rounding, except tiles, which are approximate by nature."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from lods import log

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The parts of a UNet or VAE whose inputs are kept, with all inside computed again.
CHECKPOINTED = ("ResnetBlock2D", "Transformer2DModel")
COMPILERS = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("gcc", "clang", "cc"))}


def check(cfg, device: torch.device) -> None:
    """Refuse, with one line, options that are unknown, at odds, or cannot be had here."""
    if cfg.weights_dtype not in ("auto", *DTYPES):
        raise ValueError(
            f"weights_dtype is auto, {', '.join(DTYPES)}, not {cfg.weights_dtype!r}: set "
            "system.guidance.weights_dtype"
        )
    compiled = [name for name in ("compile_unet", "compile_vae") if cfg[name]]
    if not compiled:
        return
    names = ("enable_sequential_cpu_offload", "enable_gradient_checkpointing")
    odd = [name for name in names if cfg[name]]
    without = " and ".join(f"system.guidance.{name}=false" for name in compiled)
    if odd:
        raise ValueError(
            f"{odd[0]} cannot be compiled: set system.guidance.{odd[0]}=false, or {without}"
        )
    if device.type == "cpu" and cfg.enable_channels_last_format:
        raise ValueError(
            "on the CPU torch compiles channels-last models to wrong gradients: set "
            f"system.guidance.enable_channels_last_format=false, or {without}"
        )
    variable, usual = COMPILERS.get(device.type, COMPILERS["cpu"])
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(shutil.which(name.split()[0]) for name in names):
        raise ValueError(
            f"{compiled[0]} needs a C compiler, and there is no {' or '.join(names)}: install "
            f"one (g++), or set system.guidance.{compiled[0]}=false"
        )


def weights_dtype(cfg, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights; ``auto`` is float16 on CUDA with
    ``half_precision_weights``, else float32. What is learnt and the 3D side stay float32."""
    if cfg.weights_dtype != "auto":
        return DTYPES[cfg.weights_dtype]
    if cfg.half_precision_weights and device.type != "cuda":
        log.debug("guidance: half_precision_weights applies on CUDA, float32 here")
    return torch.float16 if cfg.half_precision_weights and device.type == "cuda" else torch.float32


def apply(cfg, denoisers: list[Any], context: Callable[[], Any]) -> None:
    """Give the models of these denoisers the layout and the savings that ``cfg`` asks for.

    Called once what is learnt has been injected: its layers are not offloaded. ``context`` is
    asked when a checkpointed block runs, for what has to be in force when it is run again (see
    :func:`checkpoint_blocks`).
    """
    unets = {id(d.unet): d.unet for d in denoisers}.values()
    vaes = {id(d.vae): d.vae for d in denoisers}.values()
    device = denoisers[0].device
    offload = cfg.enable_sequential_cpu_offload
    if offload and device.type == "cpu":
        log.warn("guidance: enable_sequential_cpu_offload has no effect on the CPU")
        offload = False
    for model in (*unets, *vaes):
        use_sdpa(model)
        if cfg.enable_channels_last_format:
            model.to(memory_format=torch.channels_last)
        if cfg.enable_gradient_checkpointing:
            checkpoint_blocks(model, context)
        if offload:
            offload_layers(model, device)
    if cfg.compile_unet or cfg.compile_vae:
        log.info("guidance: torch.compile, which takes minutes within the first step")
    for vae in vaes:
        vae.use_slicing = cfg.enable_vae_slicing
        if cfg.enable_vae_tiling:
            tile(vae, denoisers[0].image_size)
        if cfg.compile_vae:
            compile_fixed(vae.encoder)
    for unet in unets:
        if cfg.enable_attention_slicing:
            unet.set_attention_slice("auto")
        if cfg.compile_unet:
            compile_fixed(unet)


def use_sdpa(model) -> None:
    """torch's ``scaled_dot_product_attention`` in every attention: no matrix of all pairs."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor2_0())


def compile_fixed(module: torch.nn.Module, backend: str = "inductor") -> None:
    """``torch.compile`` in place, one graph a shape (an image size and a number of rows)."""
    options = None
    if backend == "inductor" and next(module.parameters()).device.type == "cpu":
        # torch 2.13's own choice of layouts gave the pocket UNet gradients that were garbage,
        # another in every run (its predictions were right): benchmarks/guidance.py found it
        options = {"layout_optimization": False}
    module.compile(dynamic=False, backend=backend, options=options)


def checkpoint_blocks(model, context: Callable[[], Any]) -> None:
    """Keep the inputs of blocks only, and run a block again when its gradient is wanted.

    What is in force at the first run (the rows' strengths of a LoRA) has ended by then:
    ``context()``, asked at the first run, returns a function that makes a context manager, and
    both runs are within one.
    """
    for module in model.modules():
        # by hand, because the switch of older diffusers applies to models in training mode only
        if type(module).__name__ in CHECKPOINTED:
            module.forward = _again(module.forward, context)


def _again(forward, context):
    from torch.utils.checkpoint import checkpoint

    def run(*args, **kwargs):
        within = context()

        def block(*args, **kwargs):
            with within():
                return forward(*args, **kwargs)

        # the blocks draw no random numbers
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def offload_layers(model, device: torch.device) -> None:
    """Keep the frozen weights in the CPU's memory, and on ``device`` only those of the layer that
    runs; a gradient that goes back through a layer holds on to its copy until then, unless the
    block is checkpointed. Layers that learn stay on the device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in list(model.modules()):
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            add_hook_to_module(module, AlignDevicesHook(execution_device=device, offload=True))


def tile(vae, image_size: int) -> None:
    """Encode in tiles of half the image's size that overlap by a quarter and are blended.

    Norms and attention then see a tile and not the image: an approximation.
    """
    vae.use_tiling = True
    vae.tile_sample_min_size = image_size // 2
    vae.tile_latent_min_size = (image_size // 2) >> (len(vae.config.block_out_channels) - 1)
    vae.tile_overlap_factor = 0.25
