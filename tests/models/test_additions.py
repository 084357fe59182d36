"""LoRA files and textual inversions that are added to a frozen model, and another autoencoder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.single_files import WIDTH, write_folder

slow = pytest.mark.slow
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
FEED = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"
ALPHA, RANK, SCALE = 3.0, 2, 0.7
KOHYA = {  # where the names of diffusers have more underscores than dots
    name: f"lora_unet_{name.replace('.', '_')}" for name in (LAYER, FEED, CONV)
} | {TEXT: f"lora_te_{TEXT.replace('.', '_')}"}


@pytest.fixture(scope="module")
def folder(lods, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="module")
def xl(lods, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sdxl"), "sdxl")


def factors(folder):
    """(A, B) of a few layers of UNet and text encoder."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    generator, found = torch.Generator().manual_seed(3), {}
    for name in (LAYER, FEED, CONV, TEXT):
        weight = {**unet, **text}[f"{name}.weight"]
        down = torch.randn(RANK, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=generator)
        found[name] = down * 0.3, up * 0.3
    return found


def write_lora(folder, kind, path):
    """The same LoRA in one of the formats that are about."""
    tensors, metadata = {}, {}
    for name, (down, up) in factors(folder).items():
        part = "text_encoder" if name == TEXT else "unet"
        if kind == "kohya":
            name = KOHYA[name]
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
            continue
        up = up * (ALPHA / RANK) if kind != "noted" else up
        ends = ("lora_linear_layer.down", "lora_linear_layer.up")
        if kind == "diffusers" and part == "unet":
            ends = ("lora.down", "lora.up")
        elif kind in ("peft", "noted"):
            ends = ("lora_A", "lora_B")
        tensors |= {f"{part}.{name}.{e}.weight": v for e, v in zip(ends, (down, up))}
    if kind == "noted":
        noted = {
            f"{p}.{k}": v
            for p in ("unet", "text_encoder")
            for k, v in (("r", RANK), ("lora_alpha", ALPHA))
        }
        metadata["lora_adapter_metadata"] = json.dumps(noted)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def predictions(model, seed=5):
    torch.manual_seed(seed)
    x, t = torch.randn(2, *model.latent_shape), torch.tensor([100, 900])
    return model.predict(x, t, model.text(["a cat", "a dog"]))


@pytest.mark.parametrize(
    "kind", ["kohya", "peft", *(pytest.param(kind, marks=slow) for kind in ("noted", "diffusers"))]
)
def test_a_lora_changes_the_weights_of_unet_and_text_encoder(lods, folder, tmp_path, kind):
    file = write_lora(folder, kind, tmp_path / "style.safetensors")
    plain = lods.models.load(str(folder), "cpu")
    model = lods.models.load(str(folder), "cpu", model_lora=[f"{file}@{SCALE}"])
    before, after = plain.unet.state_dict(), model.unet.state_dict()
    for name, (down, up) in factors(folder).items():
        if name == TEXT:
            continue
        update = (up.flatten(1) @ down.flatten(1)).view_as(before[f"{name}.weight"])
        wanted = before[f"{name}.weight"] + SCALE * ALPHA / RANK * update
        torch.testing.assert_close(after[f"{name}.weight"], wanted)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in (LAYER, FEED, CONV))

    one, two = plain.text(["a cat"]), model.text(["a cat"])
    assert not torch.allclose(one, two)
    # the text encoder's layer by hand
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    short = TEXT if hasattr(encoder, "text_model") else TEXT.removeprefix("text_model.")
    down, up = factors(folder)[TEXT]
    with torch.no_grad():
        encoder.get_submodule(short).weight += SCALE * ALPHA / RANK * up @ down
        ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
            ["a cat"], padding="max_length", return_tensors="pt"
        ).input_ids
        torch.testing.assert_close(two, encoder(ids)[0])


@slow
def test_a_lora_at_scale_0_changes_nothing_and_two_add_up(lods, folder, tmp_path):
    file = write_lora(folder, "kohya", tmp_path / "a.safetensors")
    plain = predictions(lods.models.load(str(folder), "cpu"))
    none = predictions(lods.models.load(str(folder), "cpu", model_lora=f"{file}@0"))
    assert torch.equal(plain, none)
    halves = [f"{file}@0.5", f"{file}@0.5"]
    two, one = (
        predictions(lods.models.load(str(folder), "cpu", model_lora=each))
        for each in (halves, file)
    )
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, plain, atol=1e-2)


def test_the_learned_lora_stands_on_top_and_is_saved_alone(lods, folder, tmp_path):
    file = write_lora(folder, "peft", tmp_path / "style.safetensors")
    kwargs = {"prompt": "a cat", "device": "cpu"}
    method = lods.load("lods-lora", str(folder), model_lora=str(file), **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in method.lora.named_parameters():
            if "lora_B" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    saved = method.save(tmp_path / "learned.safetensors")
    learned = {k: v.clone() for k, v in method.lora.state_dict().items()}
    other = lods.load("lods-lora", str(folder), **kwargs)
    other.load(saved)
    assert all(torch.equal(v, other.lora.state_dict()[k]) for k, v in learned.items())
    # the frozen prediction, which is no row of the learned one's, is the model's with its LoRA
    model = lods.models.load(str(folder), "cpu", model_lora=str(file))
    assert torch.equal(predictions(method.model), predictions(model))
    from lods.learned.files import read_safetensors

    assert read_safetensors(saved)[1]["model_with"] == "style.safetensors@1"


def bad_loras(folder, tmp_path):
    down, up = torch.zeros(2, 64), torch.zeros(64, 2)
    name = KOHYA[LAYER]

    def write(name, tensors):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors")

    wide = {f"unet.{LAYER}.lora_A.weight": torch.zeros(2, 2048), f"unet.{LAYER}.lora_B.weight": up}
    gone = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": down}
    gone |= {key.replace("lora_A", "lora_B"): up for key in gone}
    (tmp_path / "x.pt").write_bytes(b"x")
    return [
        (write("wide", wide), "does not fit this model: for .*to_k of the unet it has 2048 to 64"),
        (write("gone", gone), "does not fit this model: its unet has no layer down_blocks.0.att"),
        (write("loha", {f"{name}.hada_w1_a": down}), "is a LyCORIS file or its like"),
        (write("lokr", {f"{name}.lokr_w1": down}), "is a LyCORIS file or its like"),
        (write("norm", {f"{name}.w_norm": down}), "is a LyCORIS file or its like"),
        (
            write("other", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down}),
            "for a model of this kind, which has no place for 'lora_unet_double|not a LoRA that",
        ),
        (
            write("flux", {"transformer.x.lora_A.weight": down, "transformer.x.lora_B.weight": up}),
            "is of a transformer, and this model has a unet: it is of another model",
        ),
        (write("half", {f"unet.{LAYER}.lora_A.weight": down}), "is not a plain LoRA"),
        (write("model", {"model.layer.weight": down}), "not a LoRA"),
        (str(tmp_path / "none.safetensors"), "model_lora: there is no file"),
        (str(tmp_path / "x.pt"), "is a pickle"),
        (f"{write('wide', wide)}@1000", r"is not in \[-100, 100\]"),
        (3, "an entry of model_lora|model_lora is path@scale|a list of texts"),
    ]


def test_a_lora_that_does_not_serve_is_told_in_one_line(lods, folder, tmp_path):
    for given, said in bad_loras(folder, tmp_path):
        with pytest.raises(ValueError, match=said) as error:
            lods.models.load(str(folder), "cpu", model_lora=given)
        assert "\n" not in str(error.value), given


# --- textual inversions ---------------------------------------------------------------------------


def inversions(tmp_path):
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(4))
    torch.save({"<thing>": vectors[0]}, tmp_path / "diffusers.bin")
    save_file({"<thing>": vectors}, tmp_path / "diffusers.safetensors")
    a1111 = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": vectors}}
    torch.save({**a1111, "name": "<thing>", "step": 3}, tmp_path / "a1111.pt")
    save_file({"emb_params": vectors}, tmp_path / "a1111.safetensors")
    return vectors


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ("diffusers.bin", 1),
        pytest.param("diffusers.safetensors", 2, marks=slow),
        ("a1111.pt", 2),
        pytest.param("a1111.safetensors@<thing>", 2, marks=slow),
        pytest.param("diffusers.safetensors@<Other>", 2, marks=slow),
    ],
)
def test_a_word_of_a_textual_inversion_is_its_vectors(lods, folder, tmp_path, entry, count):
    from transformers import CLIPTextModel, CLIPTokenizer

    vectors = inversions(tmp_path)
    model = lods.models.load(str(folder), "cpu", model_embeddings=f"{tmp_path}/{entry}")
    word = "<Other>" if "Other" in entry else "<thing>"
    plain = lods.models.load(str(folder), "cpu").text(["a red car"])
    found = model.text([f"a photo of {word}", "a red car"])
    torch.testing.assert_close(found[1:], plain)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(["a photo of" + " x" * count], padding="max_length", return_tensors="pt")
    table = encoder.get_input_embeddings()
    rows = table(ids.input_ids).detach()
    rows[0, 4 : 4 + count] = vectors[:count]  # after the mark and three words
    with torch.no_grad():
        table.forward = lambda ids: rows
        torch.testing.assert_close(found[:1], encoder(ids.input_ids)[0])


@slow
def test_a_word_for_two_encoders(lods, xl, tmp_path):
    """With the vectors of another word it is that word, in the pooled embedding too."""
    from lods.models.clip_tokens import vocabulary

    vectors = {}
    for name, part in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        stored = load_file(xl / part / "model.safetensors")
        (table,) = (v for k, v in stored.items() if k.endswith("token_embedding.weight"))
        vectors[name] = table[[vocabulary()["red</w>"]]].clone()
    file = tmp_path / "xl.safetensors"
    save_file(vectors, file)
    model = lods.models.load(str(xl), "cpu", model_embeddings=f"{file}@sks7")
    found = model.text(["a red car", "a sks7 car", "a blue car"])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0, -1], found[2, -1])


def test_a_textual_inversion_that_does_not_serve_is_told_in_one_line(lods, folder, xl, tmp_path):
    import pickle

    inversions(tmp_path)
    save_file({"<x>": torch.zeros(1, 768)}, tmp_path / "wide.safetensors")
    save_file({"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}, tmp_path / "two.safetensors")
    save_file({"<x>": torch.full((1, WIDTH), float("nan"))}, tmp_path / "nan.safetensors")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(print))
    for model, entry, said in [
        (folder, "wide.safetensors", "does not fit this model: its vectors have 768 numbers"),
        (folder, "two.safetensors", "is not a textual inversion of diffusers or A1111"),
        (folder, "nan.safetensors", "not finite"),
        (folder, "evil.pt", "cannot be read as tensors alone"),
        (folder, "diffusers.bin@!", "knows the word '!' already"),
        (folder, "none.pt", "model_embeddings: there is no file"),
        (folder, "x.txt", "is none of .safetensors"),
        (xl, "diffusers.bin", "has no vectors for its text_encoder_2"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            made = lods.models.load(str(model), "cpu", model_embeddings=[f"{tmp_path}/{entry}"])
            made.text(["a cat"])
        assert "\n" not in str(error.value), entry


# --- in threestudio -------------------------------------------------------------------------------


def test_prompt_processor_and_guidance_add_the_same_or_are_refused(lods, folder, tmp_path):
    import threestudio

    file = write_lora(folder, "kohya", tmp_path / "style.safetensors")
    common = {"pretrained_model_name_or_path": str(folder), "model_lora": [f"{file}@0.5"]}
    processor = threestudio.find("lods-prompt-processor")(
        {**common, "prompt": "a cat", "use_cache": False}
    )
    prompts = processor()
    guidance = threestudio.find("lods-sds-guidance")(common)
    guidance.initialize(prompts)
    wanted = lods.models.load(str(folder), "cpu", model_lora=f"{file}@0.5").text(["a cat"])
    torch.testing.assert_close(prompts.text_embeddings.float(), wanted)
    other = threestudio.find("lods-sds-guidance")({**common, "model_lora": None})
    with pytest.raises(ValueError, match=r"embedded with style\.safetensors@0\.5 added") as error:
        other.initialize(prompts)
    assert "\n" not in str(error.value)


@slow
def test_the_cache_of_prompts_tells_additions_apart(lods, folder, tmp_path):
    import threestudio

    file = write_lora(folder, "kohya", tmp_path / "style.safetensors")
    prints = set()
    for added in (None, f"{file}@0.5", f"{file}@0.6"):
        processor = threestudio.find("lods-prompt-processor")(
            {
                "pretrained_model_name_or_path": str(folder),
                "prompt": "a cat",
                "model_lora": added,
                "use_cache": False,
            }
        )
        prints.add(processor.fingerprint())
    assert len(prints) == 3 and None not in prints


# --- another autoencoder --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_vae(lods, tmp_path_factory):
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    path = tmp_path_factory.mktemp("tiny_vae")
    vae.save_pretrained(path)
    return path


def test_a_tiny_autoencoder_encodes_in_place_of_the_models(lods, folder, tiny_vae):
    from diffusers import AutoencoderTiny

    model = lods.models.load(str(folder), "cpu", model_vae=str(tiny_vae))
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    z = model.encode(images)
    vae = AutoencoderTiny.from_pretrained(tiny_vae).eval()
    torch.testing.assert_close(z, vae.encode(images.detach() * 2 - 1).latents)
    z.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert model.decode(z.detach()).shape == images.shape
    assert model.image_size == 16 and z.shape[1:] == model.latent_shape


@pytest.mark.parametrize("option", ["enable_gradient_checkpointing", "enable_vae_slicing"])
def test_the_savings_reach_a_tiny_autoencoder(lods, folder, tiny_vae, option):
    gradients = []
    for on in (False, True):
        settings = {"model_vae": str(tiny_vae), option: on}
        model = lods.models.load(str(folder), "cpu", **settings)
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        images.requires_grad_()
        (model.encode(images) ** 2).sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(*gradients)


def test_an_autoencoder_that_cannot_be_had_is_told_in_one_line(lods, folder, tiny_sd, monkeypatch):
    for model, vae, said in [
        (str(folder), "taesd", "hf download madebyollin/taesd$"),
        (tiny_sd(), "taesd", r"there is none for this model's latents \(scaling factor 0.7\)"),
        (str(folder), "nowhere", "there is no folder 'nowhere'"),
        (str(folder), f"{folder}/unet", "it is a UNet2DConditionModel, not an AutoencoderTiny or"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            lods.models.load(model, "cpu", model_vae=vae)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "more", "scale", "repo"),
    [
        ("UNet2DConditionModel", {}, 0.18215, "taesd"),
        ("UNet2DConditionModel", {"addition_embed_type": "text_time"}, 0.13025, "taesdxl"),
        ("MultiViewUNetModel", {}, 0.18215, "taesd"),
        ("SD3Transformer2DModel", {}, 1.5305, "taesd3"),
        ("FluxTransformer2DModel", {}, 0.3611, "taef1"),
    ],
)
def test_each_family_has_its_tiny_autoencoder(lods, kind, more, scale, repo):
    from lods.models.autoencoders import tiny_for

    network = {"_class_name": kind, **more}
    assert tiny_for(network, {"scaling_factor": scale}) == f"madebyollin/{repo}"
    with pytest.raises(ValueError, match="there is none for this model's latents"):
        tiny_for(network, {"scaling_factor": 1.0})


def test_a_model_without_a_network_refuses_what_would_change_one(lods):
    for settings in ({"model_prediction": "epsilon"}, {"model_vae": "taesd"}):
        with pytest.raises(ValueError, match="has no network, leave it out"):
            lods.models.load("pocket/ideal", "cpu", **settings)


def test_a_run_is_refused_early_where_only_one_side_has_a_lora(lods, folder, tmp_path):
    from lods.preflight import check_additions
    from omegaconf import OmegaConf

    file = str(write_lora(folder, "kohya", tmp_path / "style.safetensors"))

    def system(one, other):
        return OmegaConf.create(
            {
                "prompt_processor_type": "lods-prompt-processor",
                "prompt_processor": {"model_lora": one},
                "guidance_type": "lods-sds-guidance",
                "guidance": {"model_lora": other},
            }
        )

    check_additions(system([file], file))
    check_additions(system(None, None))
    for one, other, said in [
        (file, None, "and the guidance adds nothing"),
        (None, [f"{file}@2"], "embedded with nothing added .* adds style.safetensors@2"),
        ("gone.safetensors", None, "system.prompt_processor.model_lora: there is no file"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            check_additions(system(one, other))
        assert "\n" not in str(error.value)


def test_a_learned_part_notes_a_file_by_its_name_alone(lods):
    """And a file that was learned on another machine's checkpoint is looked at no further."""
    from lods.models.cards import canonical, noted

    assert noted("/home/me/models/dreamy.safetensors") == "dreamy.safetensors"
    assert canonical("/nowhere/dreamy.safetensors") == "/nowhere/dreamy.safetensors"
