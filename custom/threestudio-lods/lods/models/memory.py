"""Settings of a frozen model: what it is told of cameras, and what trades memory against time."""

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from lods import log
from lods.cameras import TOLD
from lods.models import quantized
from lods.models.additions import Additions

Context = Callable[[], Callable[[], AbstractContextManager[Any]]]

BFLOAT16 = {"amx_bf16", "avx512_bf16"}  # flags of a CPU
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The parts of a UNet or VAE whose inputs are kept, with all inside computed again. Transformers say
# themselves which blocks they are made of.
CHECKPOINTED = (
    "ResnetBlock2D",
    "Transformer2DModel",
    "AutoencoderTinyBlock",
    "ResBlock",  # these two of a deep-compression autoencoder
    "EfficientViTBlock",
)
CHANGES = ("model_lora", "model_embeddings", "model_vae", "model_prediction", "quantized_weights")
NOT_BLOCKS = ("PatchEmbed", "SanaModulatedNorm")  # what they name beside these
# attention as diffusers computed it before torch had a kernel
OLD_ATTENTION = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")
COMPILERS = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("gcc", "clang", "cc"))}


@dataclass
class ModelSettings:
    """How the frozen weights are loaded and run, and what the model is told of cameras. But for
    the first two and ``enable_vae_tiling`` nothing here changes a result beyond rounding."""

    # words for the view in the prompt; tokens, the camera itself, for a model with a camera_encoder
    # (as rows beside the text) or a multi-view model (as it was trained); or both
    cameras: Annotated[str, TOLD] = "words"
    # of an ideal denoiser that is told the camera, and of no other model: renders of each object
    # that it looks at, 4 unless set
    ideal_neighbours: Annotated[int | None, "[1, 10000]"] = None

    # what is added to the model before anything is learned, each one text or a list of them: LoRA
    # files as path@scale (1 without a scale), textual inversions as path@word. A prompt processor
    # has the same two settings, and needs the same values
    model_lora: Annotated[Any, "texts"] = None
    model_embeddings: Annotated[Any, "texts"] = None
    # another autoencoder for the same latents: taesd, a diffusers folder or a hub id
    model_vae: str | None = None
    # what the network predicts; auto: what the model's files say, and where they say nothing, what
    # the network shows
    model_prediction: Annotated[str, ("auto", "epsilon", "v_prediction")] = "auto"

    # of UNet and VAE: auto is float16 (of SANA bfloat16) on CUDA with half_precision_weights, else
    # float32; fastest is bfloat16 on a CPU that multiplies in it, else as auto
    weights_dtype: Annotated[str, ("auto", "fastest", *DTYPES)] = "auto"
    half_precision_weights: bool = True
    # the network's linear layers in fewer bits, by bitsandbytes on CUDA: 8bit, 4bit (nf4)
    quantized_weights: Annotated[str, quantized.WORDS] = quantized.NONE
    # speed: channels-last convolutions; torch.compile, minutes at the first step, which
    # needs a C++ compiler
    enable_channels_last_format: bool = False
    compile_unet: bool = False
    compile_vae: bool = False
    # memory, from cheap to slow: images through the VAE one by one; blocks of UNet and VAE
    # computed again for their gradients; images in tiles (the one that changes results); attention
    # heads in slices; on CUDA, weights of a layer only while it runs. Memory-efficient attention
    # is torch's own and always on.
    enable_vae_slicing: bool = False
    enable_gradient_checkpointing: bool = False
    enable_vae_tiling: bool = False
    enable_attention_slicing: bool = False
    enable_sequential_cpu_offload: bool = False
    enable_memory_efficient_attention: bool = False


def check(settings: ModelSettings, device: torch.device, where: str = "") -> None:
    """Refuse, with one line, settings that are at odds, or cannot be had here. ``where`` stands
    before their names ("system.guidance.")."""
    Additions.of(settings.model_lora, settings.model_embeddings, where)
    if settings.quantized_weights != quantized.NONE:
        bits = f"{where}quantized_weights={settings.quantized_weights}"
        if why := quantized.missing(device):
            raise ValueError(f"{bits} {why}; or set {where}quantized_weights=none")
        if settings.enable_sequential_cpu_offload:
            raise ValueError(f"{bits} and {where}enable_sequential_cpu_offload exclude each other")
    compiled = [name for name in ("compile_unet", "compile_vae") if getattr(settings, name)]
    if not compiled:
        return
    names = ("enable_sequential_cpu_offload", "enable_gradient_checkpointing")
    odd = [name for name in names if getattr(settings, name)]
    without = " and ".join(f"{where}{name}=false" for name in compiled)
    if odd:
        raise ValueError(f"{odd[0]} cannot be compiled: set {where}{odd[0]}=false, or {without}")
    if device.type == "cpu" and settings.enable_channels_last_format:
        raise ValueError(
            "on the CPU torch compiles channels-last models to wrong gradients: set "
            f"{where}enable_channels_last_format=false, or {without}"
        )
    variable, usual = COMPILERS.get(device.type, COMPILERS["cpu"])
    compilers = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(shutil.which(name.split()[0]) for name in compilers):
        raise ValueError(
            f"{compiled[0]} needs a C compiler, and there is no {' or '.join(compilers)}: install "
            f"one (g++), or set {where}{compiled[0]}=false"
        )


def refuse_changes(settings: ModelSettings, name: str) -> None:
    """Raise ``ValueError``, one line, for settings that change the network or the autoencoder of a
    model that has neither."""
    plain = ModelSettings()
    for key in CHANGES:
        if (value := getattr(settings, key)) != getattr(plain, key):
            raise ValueError(f"{key}={value}: {name!r} has no network, leave it out")


@functools.cache
def multiplies_in_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether networks are faster in bfloat16 than in float32 on ``device``: a GPU that has it, or
    a CPU with instructions for it (AMX or AVX-512 BF16, which Linux tells)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(BFLOAT16 & set(line.split()) for line in info.splitlines() if line[:5] == "flags")


def weights_dtype(
    settings: ModelSettings, device: torch.device, shorter: torch.dtype = torch.float16
) -> torch.dtype:
    """The dtype of the frozen weights; ``auto`` is ``shorter`` on CUDA with
    ``half_precision_weights``, else float32; ``fastest`` is bfloat16 on a CPU with
    :func:`multiplies_in_bfloat16`, else as ``auto``. The learned part and the 3D side stay
    float32."""
    half = settings.half_precision_weights
    if settings.weights_dtype == "fastest" and device.type == "cpu":
        fast = multiplies_in_bfloat16(device)
        log.info(f"model: weights in {'bfloat16, as this CPU is faster' if fast else 'float32'}")
        return torch.bfloat16 if fast else torch.float32
    if settings.weights_dtype in DTYPES:
        return DTYPES[settings.weights_dtype]
    if half and device.type != "cuda":
        log.debug("model: half_precision_weights applies on CUDA, float32 here")
    return shorter if half and device.type == "cuda" else torch.float32


def apply(
    settings: ModelSettings, unet: Any, vaes: Sequence[Any], image_size: int, context: Context
) -> None:
    """Give a UNet, and the VAEs that belong to it (none where it shares another's), the layout and
    the savings that ``settings`` ask for.

    Called once the learned part has been injected: its layers are not offloaded. ``context`` is
    asked when a checkpointed block runs, for what has to be in force when it is run again (see
    :func:`checkpoint_blocks`).
    """
    device = next(unet.parameters()).device
    offload = settings.enable_sequential_cpu_offload
    if offload and device.type == "cpu":
        log.warn("model: enable_sequential_cpu_offload has no effect on the CPU")
        offload = False
    for network in (unet, *vaes):
        use_sdpa(network)
        if device.type == "cpu" and next(network.parameters()).dtype == torch.bfloat16:
            for module in network.modules():
                if isinstance(module, torch.nn.GroupNorm):
                    module.__dict__["forward"] = functools.partial(norm_in_float32, module)
        if settings.enable_channels_last_format:
            network.to(memory_format=torch.channels_last)
        if settings.enable_gradient_checkpointing:
            checkpoint_blocks(network, context)
        if offload:
            offload_layers(network, device)
    if settings.compile_unet or settings.compile_vae:
        log.info("model: torch.compile, which takes minutes within the first step")
    for vae in vaes:
        vae.use_slicing = settings.enable_vae_slicing
        if settings.enable_vae_tiling:
            tile(vae, image_size)
        if settings.compile_vae:
            compile_fixed(vae.encoder)
    if settings.enable_attention_slicing and hasattr(unet, "set_attention_slice"):
        unet.set_attention_slice("auto")
    elif settings.enable_attention_slicing:
        log.warn(
            f"model: enable_attention_slicing has no effect on a {type(unet).__name__}, whose "
            "attention is torch's own"
        )
    if settings.compile_unet:
        compile_fixed(unet)


def use_sdpa(model) -> None:
    """torch's ``scaled_dot_product_attention`` in every attention: no matrix of all pairs."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    for module in model.modules():
        if type(getattr(module, "processor", None)).__name__ in OLD_ATTENTION:
            module.set_processor(AttnProcessor2_0())


def norm_in_float32(norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """A group norm that computes in float32 whatever its input's dtype, and returns that dtype: on
    a CPU its gradient takes several times as long in bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        y = torch.nn.functional.group_norm(
            x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps
        )
    return y.to(x.dtype)


def compile_fixed(module: torch.nn.Module, backend: str = "inductor") -> None:
    """``torch.compile`` in place, one graph per shape (an image size and a number of rows)."""
    options = None
    if backend == "inductor" and next(module.parameters()).device.type == "cpu":
        # torch 2.13's own choice of layouts gave the UNet of pocket-shapes gradients that were
        # garbage, another in every run (its predictions were right): see benchmarks/guidance.py
        options = {"layout_optimization": False}
    module.compile(dynamic=False, backend=backend, options=options)


def checkpoint_blocks(model, context: Context) -> None:
    """Keep the inputs of blocks only, and run a block again when its gradient is wanted.

    What is in force at the first run (the rows' strengths of a LoRA) has ended by then:
    ``context()``, asked at the first run, returns a function that makes a context manager, and
    both runs are within one. A block within a block is part of that one.
    """
    kinds, within = blocks_of(model), set()
    for module in model.modules():
        # by hand, because the switch of older diffusers applies to models in training mode only
        if type(module).__name__ in kinds and id(module) not in within:
            within.update(id(part) for part in module.modules())
            module.forward = _again(module.forward, context)


def blocks_of(model: Any) -> tuple[str, ...]:
    """The classes of the parts of a network that are computed again one by one: those of a UNet or
    VAE, or the blocks that a transformer of diffusers names (``_no_split_modules``)."""
    if any(type(module).__name__ in CHECKPOINTED for module in model.modules()):
        return CHECKPOINTED
    named = getattr(model, "_no_split_modules", None) or ()
    return tuple(name for name in named if name not in NOT_BLOCKS)


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
    if hasattr(vae, "spatial_compression_ratio"):  # a deep-compression autoencoder
        tile, each = image_size // 2, vae.spatial_compression_ratio
        step = max(tile * 3 // 4 // each, 1) * each  # whole latents
        vae.enable_tiling(tile, tile, step, step)
        return
    vae.use_tiling = True
    vae.tile_sample_min_size = image_size // 2
    vae.tile_latent_min_size = (image_size // 2) >> (len(vae.config.block_out_channels) - 1)
    vae.tile_overlap_factor = 0.25
