"""One step of a guidance, timed: the original's call pattern against ours, at equal results.

A step is all that a guidance does for a rendered image: encode it with gradients, the learnt
prior's own loss, the gradient of the distillation, and one backward pass through both. Models have
true sizes and random weights made here (time does not depend on them, nothing is downloaded). The
ways, interleaved, the minimum of each over all rounds:

- ``reference``: UNet calls one by one (prompt, learnt, training), the whole softmax(Q K^T) of
  every attention, and for LoRA the original's float32 layers on q, k, v and out;
- ``reference sdpa``: the same with torch's attention, and for the embedding its first two
  calls in one: what was published, which wrote the matrix out for LoRA only;
- ``ours``, ``ours channels-last``, ``ours compiled``;
- ``ours one call``: the training rows in the call of the other two.

On a CPU the half-size model is not compiled: that takes longer than all else together.

Every way gets the same random numbers, once more before the clock starts, and its losses and
gradients are compared with the reference's (``loss_difference``, ``gradient_difference``: largest
relative to the reference's largest element; the run stops above ``--tolerance``).

``--models sd3-medium`` (8 GB of weights in float32) and ``tiny-flow`` are transformers of Stable
Diffusion 3's kind, into a table of their own: there the reference makes its three calls of
diffusers' own transformer, takes velocities for what they are, and adds LoRA in layers of its own;
beside ``ours`` stands ``ours checkpointed``, which computes blocks again for their gradients.
"""

import argparse
import contextlib
import ctypes
import gc
import math
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from flow_reference import SHIFT, FlowReference
from flow_reference import TOKENS as FLOW_TOKENS
from shapes import (
    SD3_TRANSFORMER,
    SD3_VAE,
    SD_UNET,
    SD_VAE,
    TINY_TRANSFORMER,
    TINY_VAE,
    halved,
)
from timing import ROOT, fastest, machine, show, write_table
from unet_reference import RANK, SCALE, STRENGTH, Reference

GUIDANCES = {"lora": "lods-lora-guidance", "embedding": "lods-embedding-guidance"}
WAYS = (
    "reference",
    "reference sdpa",
    "ours",
    "ours channels-last",
    COMPILED := "ours compiled",
    "ours one call",
)
CHECKPOINTED = "ours checkpointed"
FLOW_WAYS = ("reference", "ours", CHECKPOINTED, COMPILED)
FLOWS = {"sd3-medium": (SD3_TRANSFORMER, SD3_VAE), "tiny-flow": (TINY_TRANSFORMER, TINY_VAE)}
TOKENS = 77


def build(model: str, pixels: int, device: str, dtype: torch.dtype):
    """Network, VAE and schedule of random weights, or those of pocket-shapes."""
    if model in FLOWS:
        network_config, vae_config = FLOWS[model]
        torch.manual_seed(0)
        with torch.device(device):
            unet = diffusers.SD3Transformer2DModel(**network_config | {"sample_size": pixels // 8})
            vae = diffusers.AutoencoderKL(**vae_config)
        for weight in unet.parameters():
            if not weight.any():  # what starts as 0 would hide what is wrong before it
                torch.nn.init.normal_(weight, std=0.02)
        schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    elif model == "pocket-shapes":
        folder = ROOT / "custom/threestudio-lods/lods/models/pocket-shapes"
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
        # read as noise, which is all that the original knew
        schedule = diffusers.DDPMScheduler.from_pretrained(
            folder, subfolder="scheduler", prediction_type="epsilon"
        )
    else:
        unet_config, vae_config = {
            "full": (SD_UNET, SD_VAE),
            "half": (halved(SD_UNET), halved(SD_VAE)),
        }[model]
        torch.manual_seed(0)
        with torch.device(device):
            unet = diffusers.UNet2DConditionModel(**unet_config | {"sample_size": pixels // 8})
            vae = diffusers.AutoencoderKL(**vae_config)
        schedule = diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
    for module in (unet, vae):
        module.to(device, dtype).eval().requires_grad_(False)
    return unet, vae, schedule


def twin(model):
    """Another model on the same weights (a change of layout makes its own)."""
    with torch.device("meta"):
        copy = type(model).from_config(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    return copy.eval().requires_grad_(False)


class Prompt:
    """What a prompt processor hands over: one prompt and the null, for all cameras."""

    use_perp_neg = False

    def __init__(self, width: int, device: str, rows: int = TOKENS):
        self.both = torch.randn(2, 1, rows, width, device=device)
        self.text_embeddings, self.uncond_text_embeddings = self.both

    def get_text_embeddings(self, rows, *_):
        return self.both.expand(-1, len(rows), -1, -1).flatten(0, 1)


class Ours:
    """A guidance of the extension on these models, and its step."""

    def __init__(self, guidance: str, unet, vae, schedule, one_call: bool = False, **options):
        from lods import models
        from lods.models.sd3 import SD3Model
        from lods.models.text_layout import TextLayout
        from lods.models.unet import UNetModel

        import threestudio

        flow = isinstance(unet, diffusers.SD3Transformer2DModel)

        self.one_call = one_call

        def load(name, device, settings):
            model = (SD3Model if flow else UNetModel)(unet, vae, schedule, unet.device, name)
            model.settings = settings
            model.text_layout = TextLayout(TOKENS, model.text_width)
            if flow:
                pooled = unet.config.pooled_projection_dim
                model.text_layout = TextLayout(FLOW_TOKENS, model.text_width, pooled)
            return model

        name = f"benchmarked-{id(self)}"
        models.register(name, load)
        options |= {"guidance_scale": SCALE, "pretrained_model_name_or_path": name}
        if guidance == "lora":
            options |= {"lora_scale": STRENGTH, "lora_rank": RANK}
        self.guidance = threestudio.find(GUIDANCES[guidance])(options)
        lora = getattr(self.guidance, "lora", None)
        self.learnt = dict((self.guidance.method if lora is None else lora).named_parameters())

    def step(self, rgb, prompt):
        if self.one_call:
            sds, prior = self.losses_of_one_call(rgb, prompt)
        else:
            seen = rgb.new_zeros(3, len(rgb))  # of prompts without words for the view
            out = self.guidance(rgb, prompt, *seen)
            sds, prior = (v for k, v in out.items() if k.startswith("loss_"))
        (sds + prior).backward()
        return sds.detach(), prior.detach()

    def losses_of_one_call(self, rgb, prompt):
        """The guidance's forward with all three predictions as rows of one call."""
        from lods import scores

        g, d = self.guidance, self.guidance.model
        g.initialize(prompt)
        z = g.encode(rgb)
        y, null = prompt.get_text_embeddings(z).chunk(2)
        n = len(z)
        t = torch.randint(d.schedule.steps, (n,), device=z.device)
        eps = torch.randn_like(z, memory_format=torch.contiguous_format)
        t_g = torch.randint(g.min_step, g.max_step + 1, (n,), device=z.device)
        eps_g = torch.randn_like(z, memory_format=torch.contiguous_format)
        x_g = d.add_noise(z.detach(), eps_g, t_g)
        x = torch.cat([x_g, x_g, d.add_noise(z.detach(), eps, t)])
        if hasattr(g, "lora"):
            strength = z.new_tensor([0.0, STRENGTH, STRENGTH]).repeat_interleave(n)
            text, within = torch.cat([y, null, null]), g.lora.strength(strength)
        else:
            learnt = g.learnable_embedding.expand(n, -1, -1)
            text, within = torch.cat([y, learnt.detach(), learnt]), contextlib.nullcontext()
        with within:
            eps_c, eps_u, eps_p = d.predict(x, torch.cat([t_g, t_g, t]), text).chunk(3)
        grad = scores.lods(eps_c, eps_u, eps_g, SCALE, g.weight(t_g)).detach()
        target = (z - grad.nan_to_num()).detach()
        return 0.5 * F.mse_loss(z, target, reduction="sum") / n, F.mse_loss(eps_p, eps)


def contestants(guidance: str, ways, unet, vae, schedule) -> dict:
    """way -> object with ``step`` and ``learnt``, all with the same weights."""
    makers = {
        "ours": lambda: Ours(guidance, twin(unet), twin(vae), schedule),
        "ours channels-last": lambda: Ours(
            guidance, twin(unet), twin(vae), schedule, enable_channels_last_format=True
        ),
        COMPILED: lambda: Ours(
            guidance, twin(unet), twin(vae), schedule, compile_unet=True, compile_vae=True
        ),
        "ours one call": lambda: Ours(guidance, twin(unet), twin(vae), schedule, one_call=True),
        CHECKPOINTED: lambda: Ours(
            guidance, twin(unet), twin(vae), schedule, enable_gradient_checkpointing=True
        ),
    }
    made = {way: makers[way]() for way in makers if way in ways or way == "ours"}
    first = made["ours"]
    model = first.guidance.method.model
    prompt = Prompt(model.text_width, unet.device, model.text_shape[0])
    with torch.no_grad():
        for name, value in first.learnt.items():
            if name.endswith("lora_B.weight"):  # zero at first, and then nothing to compare
                value.normal_(std=0.02)
        for one in made.values():
            one.guidance.initialize(prompt)
            for name, value in first.learnt.items():
                one.learnt[name].copy_(value)
    if isinstance(unet, diffusers.SD3Transformer2DModel):
        made["reference"] = FlowReference(
            first.guidance, twin(unet), twin(vae), SCALE, STRENGTH, RANK
        )
        return {way: made[way] for way in FLOW_WAYS if way in ways or way == "reference"}, prompt
    for way, sdpa in (("reference", False), ("reference sdpa", True)):
        if way in ways or way == "reference":
            pair = sdpa and guidance == "embedding"
            made[way] = Reference(first.guidance, twin(unet), twin(vae), sdpa, pair)
    return {way: made[way] for way in WAYS if way in ways or way == "reference"}, prompt


def clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:  # give freed memory back, and let the kernel's high-water mark start anew
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def held_and_peak(device: str) -> tuple[float, float]:
    """Memory held now, and the most since ``clean``, in MiB."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    now, most = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024 for key in ("VmRSS", "VmHWM"))
    return now, most


def take(one, rgb, prompt, seed: int, device: str) -> dict:
    """One step from this seed: seconds, memory, losses and gradients."""
    rgb = rgb.clone().requires_grad_()
    torch.manual_seed(seed)
    clean(device)
    before = held_and_peak(device)[0]
    begin = time.perf_counter()
    losses = one.step(rgb, prompt)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    mib = held_and_peak(device)[1] - before
    grads = {"rgb": rgb.grad} | {name: value.grad for name, value in one.learnt.items()}
    for value in one.learnt.values():
        value.grad = None
    return {"seconds": seconds, "mib": mib, "losses": losses, "grads": grads}


def differences(result: dict, reference: dict) -> tuple[float, float]:
    """Largest relative differences of the losses, and of gradients to the largest of their kind
    (the image's, the learnt prior's)."""
    loss = max(float(abs(a - b) / abs(b)) for a, b in zip(result["losses"], reference["losses"]))
    grad = 0.0
    for names in ({"rgb"}, reference["grads"].keys() - {"rgb"}):
        largest = max(float(reference["grads"][n].abs().max()) for n in names)
        apart = (float((result["grads"][n] - reference["grads"][n]).abs().max()) for n in names)
        grad = max(grad, max(apart) / largest)
    return loss, grad


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Multiply-adds of a large matrix product, in FLOP/s: what the device can do at most."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)

    def product():
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * n**3 / fastest(product, budget=1.0)


def count_flops(one, rgb, prompt) -> int:
    """Of the reference, whose attention is plain products: none is hidden in a kernel."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        one.step(rgb.clone().requires_grad_(), prompt)
    return counter.get_total_flops()


def measure(guidance, model, ways, pixels, batch, args, device, dtype, rate) -> list[dict]:
    unet, vae, schedule = build(model, pixels, device, dtype)
    torch.compiler.reset()
    ones, prompt = contestants(guidance, ways, unet, vae, schedule)
    rgb = torch.rand(batch, pixels, pixels, 3, device=device)
    checked = {way: take(one, rgb, prompt, 1, device) for way, one in ones.items()}
    flow = model in FLOWS  # the attention of its reference is a kernel, which hides its products
    flops = math.nan if flow else count_flops(ones["reference"], rgb, prompt)
    best = dict.fromkeys(ones, math.inf)
    memory = dict.fromkeys(ones, math.inf)
    for seed in range(2, 2 + args.rounds):
        for way, one in ones.items():
            result = take(one, rgb, prompt, seed, device)
            best[way] = min(best[way], result["seconds"])
            memory[way] = min(memory[way], result["mib"])
    rows = []
    for way in ones:
        loss, grad = differences(checked[way], checked["reference"])
        rows.append(
            {
                "guidance": guidance,
                "model": model,
                "pixels": pixels,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "way": way,
                "step_ms": round(best[way] * 1e3, 1),
                "speedup": round(best["reference"] / best[way], 2),
                "loss_difference": f"{loss:.1e}",
                "gradient_difference": f"{grad:.1e}",
                "step_mib": round(memory[way]),
                "first_step_s": round(checked[way]["seconds"], 1),
            }
        )
        if flow:
            size = sum(p.nbytes for part in (unet, vae) for p in part.parameters())
            rows[-1]["weights_mib"] = round(size / 2**20)
        else:
            rows[-1]["tflop"] = round(flops / 1e12, 3)
            rows[-1]["matmul_share"] = round(flops / best[way] / rate, 3)
        if not max(loss, grad) <= args.tolerance:
            raise SystemExit(f"{way} is not the reference: {rows[-1]}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=("full", "half", "pocket-shapes", *FLOWS))
    parser.add_argument("--pixels", type=int, help="of true-size models: 512, on a CPU 256")
    parser.add_argument("--batch", type=int, nargs="+", help="1 4 8, of half-size models 1")
    parser.add_argument("--guidances", nargs="+", choices=GUIDANCES, default=list(GUIDANCES))
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, CHECKPOINTED))
    parser.add_argument("--rounds", type=int, default=10 if cuda else 5)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--tolerance", type=float, help="0.001 in float32, else 0.1")
    parser.add_argument("--quick", action="store_true", help="seconds: is it right, not how fast")
    parser.add_argument("--out", type=Path, help="guidance.csv, of flows guidance_flow.csv")
    args = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    diffusers.utils.logging.set_verbosity_error()  # of casts that are meant
    args.models = args.models or (["full"] if cuda else ["pocket-shapes", "half"])
    if args.quick:
        flows = [model for model in args.models if model == "tiny-flow"]
        args.models, args.rounds, args.batch = flows or ["pocket-shapes"], 1, [2]
        args.ways = [way for way in args.ways or (*WAYS, CHECKPOINTED) if way != COMPILED]
        args.out = ROOT / "build/guidance-quick.csv"
    if 0 < len([model for model in args.models if model in FLOWS]) < len(args.models):
        parser.error("--models: flows have a table of their own, name them in a run of their own")
    if args.out is None:
        name = "guidance_flow.csv" if args.models[0] in FLOWS else "guidance.csv"
        args.out = ROOT / "benchmarks/results" / name
    dtype = getattr(torch, args.dtype or ("float16" if cuda else "float32"))
    args.tolerance = args.tolerance or (1e-3 if dtype == torch.float32 else 0.1)
    sys.path.insert(0, str(ROOT))
    from threestudio.utils.extensions import load_extension

    load_extension(ROOT / "custom/threestudio-lods")
    about = machine() | {"diffusers": diffusers.__version__, "peft": version("peft")}
    if cuda:
        about["device"] = torch.cuda.get_device_name()
    rate, rows = matmul_rate(device, dtype), []
    print(f"matrix products: {rate / 1e12:.2f} TFLOP/s", flush=True)
    for model in args.models:
        small = model in ("pocket-shapes", "tiny-flow")
        pixels = 64 if small else args.pixels or (512 if cuda else 256)
        true_size = model in ("half", "sd3-medium")
        for guidance in args.guidances:
            for batch in args.batch or ([1] if true_size else [1, 4, 8]):
                asked = args.ways or (FLOW_WAYS if model in FLOWS else WAYS)
                ways = [w for w in asked if cuda or small or w != COMPILED]
                got = measure(guidance, model, ways, pixels, batch, args, device, dtype, rate)
                rows += [row | about for row in got]
                for row in got:
                    show(row, about)
                write_table(args.out, rows)
    print(args.out)


if __name__ == "__main__":
    main()
