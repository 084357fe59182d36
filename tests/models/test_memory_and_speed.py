"""Options for memory and speed: what they do, and that they change nothing else."""

import gc
import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import threestudio
from tests.guidance_oracles import random_prompt, side_view
from tests.runs import ROOT
from threestudio import find

EMBEDDING, LORA = METHODS = ["lods-embedding-guidance", "lods-lora-guidance"]
VSD = "lods-vsd-guidance"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def memory(lods):
    return importlib.import_module("lods.models.memory")


@pytest.fixture(scope="module")
def make(lods, tiny_sd):
    def build(name, **fields):
        torch.manual_seed(6)
        if name == VSD:
            fields["guidance_scale"] = 2.0  # a large one, not over s as LODS, enlarges rounding
        guidance = find(name)({"pretrained_model_name_or_path": tiny_sd(), **fields})
        if name != EMBEDDING:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for key, value in guidance.named_parameters():
                    if "lora_B" in key or "linear_2" in key:
                        value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        return guidance

    return build


def step(guidance, size=16):
    """Losses, the image's gradient, and those of the learned part, for one seed."""
    torch.manual_seed(7)
    rgb = torch.rand(2, size, size, 3).requires_grad_()
    cameras = torch.rand(2, 4, 4)
    out = guidance(rgb, random_prompt(), *side_view(2), c2w=cameras)
    losses = [value for key, value in out.items() if key.startswith("loss_")]
    sum(losses).backward()
    return [*(v.detach() for v in losses), rgb.grad, *(p.grad for p in guidance.parameters())]


def close(got, wanted, tolerance: float) -> None:
    """Equal to ``tolerance`` of the largest element."""
    assert len(got) == len(wanted) > 2
    for a, b in zip(got, wanted):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("name", [*METHODS, VSD])
@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"enable_channels_last_format": True}, 1e-4),
        ({"enable_vae_slicing": True}, 1e-4),
        ({"enable_attention_slicing": True}, 1e-4),
        ({"enable_gradient_checkpointing": True}, 0),
        ({"weights_dtype": "float32"}, 0),
        ({"weights_dtype": "float16"}, 0.05),
        ({"weights_dtype": "bfloat16"}, 0.2),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_an_option_equals_the_plain_path(make, name, fields, tolerance):
    guidance = make(name, **fields)
    got = step(guidance)
    assert all(value.dtype == torch.float32 for value in got)
    close(got, step(make(name)), tolerance)
    dtype = getattr(torch, fields.get("weights_dtype", "float32"))
    for model in (guidance.model.unet, guidance.model.vae):
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert {p.dtype for p in frozen} == {dtype}


@pytest.mark.parametrize(
    ("device", "bfloat16", "half", "dtype"),
    [
        ("cpu", True, True, torch.bfloat16),
        ("cpu", False, True, torch.float32),
        ("cuda", True, True, torch.float16),  # as auto
        ("cuda", True, False, torch.float32),
    ],
)
def test_the_fastest_weights_depend_on_the_processor(
    memory, monkeypatch, device, bfloat16, half, dtype
):
    monkeypatch.setattr(memory, "multiplies_in_bfloat16", lambda device: bfloat16)
    settings = memory.ModelSettings(weights_dtype="fastest", half_precision_weights=half)
    assert memory.weights_dtype(settings, torch.device(device)) == dtype


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags : fpu amx_bf16 sse", True),
        ("flags : avx512f sse", False),
        ("bugs : amx_bf16", False),
    ],
)
def test_a_cpu_that_multiplies_in_bfloat16_says_so(memory, monkeypatch, line, expected):
    monkeypatch.setattr(memory.Path, "read_text", lambda self: f"processor : 0\n{line}\n")
    assert memory.multiplies_in_bfloat16.__wrapped__("cpu") is expected


def test_group_norms_of_bfloat16_weights_compute_in_float32(memory):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(2, 8).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8, 4, 4).to(torch.bfloat16)
    wanted = torch.nn.functional.group_norm(
        x.float(), 2, norm.weight.float(), norm.bias.float(), norm.eps
    )
    assert torch.equal(memory.norm_in_float32(norm, x), wanted.to(torch.bfloat16))


@pytest.mark.parametrize("name", METHODS)
def test_no_group_norm_of_a_step_computes_in_bfloat16(make, monkeypatch, name):
    plain, seen = torch.nn.functional.group_norm, set()

    def noted(x, *args, **kwargs):
        seen.add(x.dtype)
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "group_norm", noted)
    step(make(name, weights_dtype="bfloat16"))
    assert seen == {torch.float32}


def test_images_go_through_the_vae_one_by_one(make):
    for sliced, expected in ((False, [2]), (True, [1, 1])):
        guidance, rows = make(EMBEDDING, enable_vae_slicing=sliced), []
        guidance.model.vae.encoder.register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(len(args[0]))
        )
        step(guidance)
        assert rows == expected


def test_layout_of_the_vae(make):
    vae = make(EMBEDDING, enable_channels_last_format=True).model.vae
    assert vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_attention_is_torchs_own(make):
    guidance = make(LORA)
    for model in (guidance.model.unet, guidance.model.vae):
        processors = [m.processor for m in model.modules() if hasattr(m, "set_processor")]
        assert {type(p).__name__ for p in processors} == {"AttnProcessor2_0"}


@pytest.mark.parametrize("name", METHODS)
def test_blocks_are_computed_again_for_the_gradient_only(make, name):
    counts = {}
    for again in (False, True):
        guidance, calls = make(name, enable_gradient_checkpointing=again), []
        layer = guidance.model.unet.mid_block.resnets[0].conv1
        layer.register_forward_hook(lambda *_, calls=calls: calls.append("unet"))
        layer = guidance.model.vae.encoder.mid_block.resnets[0].conv1
        layer.register_forward_hook(lambda *_, calls=calls: calls.append("vae"))
        step(guidance)
        counts[again] = (calls.count("unet"), calls.count("vae"))
    # learning and encoding have gradients, the two predictions of the other call have none
    assert counts == {False: (2, 1), True: (3, 2)}


def test_rows_keep_their_strengths_when_computed_again(make):
    """Also those of another call that is made before the backward pass."""
    grads = []
    for again in (False, True):
        guidance = make(LORA, enable_gradient_checkpointing=again)
        x, t, text = torch.ones(2, 4, 8, 8), torch.tensor([20, 900]), torch.ones(2, 16, 32)
        total = 0.0
        for rows in (torch.tensor([0.2, 0.9]), 0.5, torch.tensor([0.0, 0.0])):
            with guidance.lora.strength(rows):
                total = total + guidance.model.predict(x, t, text).square().mean()
        total.backward(retain_graph=True)
        total.backward()  # a second time, which computes again again
        grads.append([p.grad for p in guidance.lora.parameters()])
    close(grads[1], grads[0], 0)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", [*METHODS, VSD])
def test_weights_are_there_only_while_a_layer_runs(make, memory, name, again):
    guidance = make(name, enable_gradient_checkpointing=again)
    plain = step(make(name))
    for model in (guidance.model.unet, guidance.model.vae):
        memory.offload_layers(model, CPU)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert {p.device.type for p in frozen} == {"meta"}
    close(step(guidance), plain, 0)
    assert {p.device.type for p in frozen} == {"meta"}
    assert all(p.device.type == "cpu" for p in guidance.parameters())


def test_offload_is_for_a_gpu(make, memory, monkeypatch):
    said, calls = [], []
    monkeypatch.setattr(threestudio, "warn", said.append)
    monkeypatch.setattr(memory, "offload_layers", lambda model, device: calls.append(device.type))
    guidance = make(LORA, enable_sequential_cpu_offload=True)
    assert len(said) == 1 and "has no effect on the CPU" in said[0] and calls == []

    # where the weights are on a GPU, which their parameters say
    class OnGPU(nn.Module):
        def parameters(self, recurse=True):
            return iter([SimpleNamespace(device=torch.device("cuda"))])

    settings = guidance.model.settings
    memory.apply(settings, OnGPU(), [OnGPU()], 16, guidance.recompute_context)
    assert len(said) == 1 and calls == ["cuda", "cuda"], "UNet and VAE, each once"


def test_tiles_are_nearly_the_whole(lods, memory):
    """On a trained VAE and a smooth picture: an approximation, with a usable gradient."""
    name = str(ROOT / "custom/threestudio-lods/lods/models/pocket-shapes")
    ramp = torch.linspace(0, 1, 64)
    picture = torch.stack(torch.broadcast_tensors(ramp, ramp[:, None], torch.tensor(0.5)), -1)
    results = []
    for tiled in (False, True):
        fields = {"pretrained_model_name_or_path": name, "enable_vae_tiling": tiled}
        guidance, sizes = find(EMBEDDING)(fields), []
        guidance.model.vae.encoder.register_forward_pre_hook(
            lambda _, args, sizes=sizes: sizes.append(args[0].shape[-1])
        )
        rgb = picture[None].clone().requires_grad_()
        torch.manual_seed(0)
        latents = guidance.encode(rgb)
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad((latents * torch.randn_like(latents)).sum(), rgb)
        results.append((latents.detach(), grad))
        assert max(sizes) == (32 if tiled else 64)
    for whole, tiles, least in zip(*results, (0.9, 0.9)):
        assert whole.shape == tiles.shape and not torch.equal(whole, tiles)
        assert torch.cosine_similarity(whole.flatten(), tiles.flatten(), 0) > least


# --- compilation ----------------------------------------------------------------------------------


class OneAttention(nn.Module):
    def __init__(self):
        super().__init__()
        from diffusers.models.attention_processor import Attention

        self.attn = Attention(query_dim=8, heads=2, dim_head=4)

    def forward(self, x):
        return self.attn(x)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_strengths_survive_compilation(memory, lods, backend):
    RowLora = importlib.import_module("lods.learned.lora").RowLora
    torch.manual_seed(0)
    model, x = OneAttention().requires_grad_(False), torch.randn(2, 3, 8)
    lora = RowLora(model)
    for value in lora.parameters():
        value.data.normal_()
    strengths = (0.5, torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.3]), 0.0)

    def results():
        for strength in strengths:
            with lora.strength(strength):
                loss = model(x).square().sum()
            yield [loss.detach(), *torch.autograd.grad(loss, list(lora.parameters()))]

    plain = list(results())
    torch.compiler.reset()
    memory.compile_fixed(model, backend)
    compiled = list(results())
    for got, wanted in zip(compiled, plain):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len({float(r[0]) for r in plain}) == len(strengths)  # strengths matter
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()


def test_what_is_compiled(make, memory, monkeypatch):
    compiled = []
    monkeypatch.setattr(memory, "compile_fixed", compiled.append)
    for unet in (False, True):
        for vae in (False, True):
            model = make(LORA, compile_unet=unet, compile_vae=vae).model
            expected = [model.vae.encoder] * vae + [model.unet] * unet
            assert list(map(id, compiled)) == list(map(id, expected))
            compiled.clear()


def test_a_missing_compiler_is_one_clear_line(make, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for field in ("compile_unet", "compile_vae"):
        with pytest.raises(ValueError, match=rf"{field} needs a .* compiler.*\.{field}=false") as e:
            make(LORA, **{field: True})
        assert "\n" not in str(e.value)
    monkeypatch.setenv("CXX", "nowhere++ -O2")
    with pytest.raises(ValueError, match=r"there is no nowhere\+\+"):
        make(LORA, compile_unet=True)


def test_options_that_cannot_be_had_are_one_clear_line(make):
    with pytest.raises(ValueError, match=r"must be one of auto, fastest, float16, .* not 'half'"):
        make(EMBEDDING, weights_dtype="half")
    for odd in ("enable_sequential_cpu_offload", "enable_gradient_checkpointing"):
        with pytest.raises(ValueError, match=rf"{odd}=false, or system.guidance.compile_unet="):
            make(EMBEDDING, compile_unet=True, **{odd: True})
    with pytest.raises(ValueError, match=r"channels_last_format=false, or .*\.compile_vae=false"):
        make(EMBEDDING, compile_vae=True, enable_channels_last_format=True)


def test_the_cpu_compiles_without_a_choice_of_layouts(memory, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append(how))
    memory.compile_fixed(torch.nn.Linear(2, 2))
    # with it, gradients of the model of shapes are wrong: benchmarks/guidance.py compares them
    assert asked[0]["options"] == {"layout_optimization": False} and not asked[0]["dynamic"]


# --- what is not done -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_no_step_decodes(make, monkeypatch, name):
    guidance = make(name)

    def refuse(*args, **kwargs):
        raise AssertionError("a step has decoded latents that nobody looks at")

    for holder in (guidance.model.vae, guidance.model):
        monkeypatch.setattr(holder, "decode", refuse)
    guidance.model.vae.decoder.register_forward_pre_hook(refuse)
    assert step(guidance)[0] > 0
    with pytest.raises(AssertionError, match="nobody looks at"):
        guidance.model.decode(torch.zeros(1, 4, 8, 8))


def test_the_text_encoder_is_freed(tiny_sd, tmp_path, monkeypatch):
    from transformers import CLIPTextModel

    def alive():
        gc.collect()
        return sum(type(thing) is CLIPTextModel for thing in gc.get_objects())

    monkeypatch.chdir(tmp_path)
    before, folder = alive(), tiny_sd()
    kind = find("stable-diffusion-prompt-processor")
    processor = kind({"pretrained_model_name_or_path": folder, "prompt": "a red car"})
    assert processor().text_embeddings.shape == (1, 16, 32)
    assert alive() == before
    kept = processor._load()[1]
    assert alive() == before + 1
    del kept
