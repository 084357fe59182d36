"""The learned part as files: read by others, and taken back."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import threestudio
from tests.guidance_oracles import random_prompt, side_view
from tests.hostile import Bomb, one_line
from threestudio import find

EMBEDDING, LORA, SDS = "lods-embedding-guidance", "lods-lora-guidance", "lods-sds-guidance"

# what a user of diffusers writes; it must not need this project
STOCK = """
import sys, torch
from diffusers import DiffusionPipeline
out = {}
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    def sample():
        torch.manual_seed(0)
        found = pipeline("a hamburger", num_inference_steps=3, output_type="np").images
        return torch.from_numpy(found)
    def predict():
        c, g = pipeline.unet.config, torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, c.sample_size, c.sample_size, generator=g)
        e, more = torch.randn(2, 17, c.cross_attention_dim, generator=g), {}
        if c.addition_embed_type:
            size = 2.0 * c.sample_size
            ids = torch.tensor([[size, size, 0, 0, size, size]] * 2)
            more = {"added_cond_kwargs": {"text_embeds": e[:, 16, :40], "time_ids": ids}}
        e = e[:, :16]
        with torch.no_grad():
            return pipeline.unet(x, torch.tensor([10, 900]), encoder_hidden_states=e, **more).sample
    before = sample(), predict()
    pipeline.load_lora_weights(".", weight_name=f"lora{len(out)}.safetensors")
    out[str(len(out))] = {
        "kind": type(pipeline).__name__, "before": before, "after": (sample(), predict())
    }
ours = [m for m in sys.modules if m.split(".")[0] in ("threestudio", "lods", "tests")]
torch.save({"ours": ours, **out}, "out.pt")
"""


@pytest.fixture
def make(lods, tiny_sd):
    def build(name, **fields):
        return find(name)({"pretrained_model_name_or_path": tiny_sd(), **fields})

    return build


def trained(guidance, steps=8, prompt=None):
    """``guidance`` after some steps at a high rate."""
    prompt = prompt or random_prompt()
    optimizer = torch.optim.Adam(guidance.parameters(), lr=0.03)
    torch.manual_seed(5)
    for _ in range(steps):
        out = guidance(torch.rand(2, 16, 16, 3), prompt, *side_view(2))
        optimizer.zero_grad()
        sum(v for k, v in out.items() if k in ("loss_lora", "loss_embedding")).backward()
        optimizer.step()
    return guidance


def prediction(guidance, strength):
    model, g = guidance.lora_model, torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, model.latent_size, model.latent_size, generator=g)
    e = torch.randn(2, 17, model.text_width, generator=g)[:, : 16 + model.pooled_rows]
    with torch.no_grad(), guidance.lora.strength(strength):
        return model.predict(x, torch.tensor([10, 900]), e)


@pytest.mark.slow
def test_stock_pipelines_take_a_trained_lora(make, tiny_sd, tmp_path):
    folders = {
        "StableDiffusionPipeline": tiny_sd(),
        "StableDiffusionXLPipeline": tiny_sd(kind="sdxl"),
    }
    trainees = []
    for folder, prompt in zip(folders.values(), (None, random_prompt(tokens=17, width=64))):
        guidance = make(LORA, lora_scale=0.7, pretrained_model_name_or_path=folder)
        trainees.append(trained(guidance, prompt=prompt))
        guidance.save_learned(tmp_path / f"lora{len(trainees) - 1}.safetensors")
    command = [sys.executable, "-I", "-W", "ignore", "-c", STOCK, *folders.values()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["ours"] == []
    for i, (kind, guidance) in enumerate(zip(folders, trainees)):
        out = found[str(i)]
        assert out["kind"] == kind
        assert (out["after"][0] - out["before"][0]).abs().max() > 1e-2  # the picture is another
        for when, strength in (("before", 0.0), ("after", 0.7)):
            want = prediction(guidance, strength)
            torch.testing.assert_close(out[when][1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_lora_is_taken_back(make, tmp_path, scale):
    guidance = trained(make(LORA, lora_scale=0.5))
    path = guidance.save_learned(tmp_path / "lora.safetensors")
    again = make(LORA, lora_scale=scale, weights=str(path))
    want = prediction(guidance, 0.5)
    assert (want - prediction(guidance, 0.0)).abs().max() > 1e-2
    torch.testing.assert_close(prediction(again, scale), want, rtol=1e-4, atol=1e-5)
    # and a second pass through a file changes nothing more
    twice = again.save_learned(tmp_path / "twice.safetensors")
    first, second = load_file(path), load_file(twice)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_a_lora_of_peft_is_taken(make, tmp_path):
    """Its names, and alpha = 8 over rank 4 from its metadata."""
    guidance = trained(make(LORA))
    own = {name: value.clone() for name, value in guidance.lora.state_dict().items()}
    noted = json.dumps({"unet.r": 4, "unet.lora_alpha": 8})
    tensors = {f"unet.{name}": value for name, value in own.items()}
    save_file(tensors, tmp_path / "peft.safetensors", {"lora_adapter_metadata": noted})
    again = make(LORA, lora_scale=0.25, weights=str(tmp_path / "peft.safetensors"))
    for name, value in again.lora.state_dict().items():
        factor = 2 / 0.25 if "lora_B" in name else 1.0
        torch.testing.assert_close(value, own[name] * factor)


@pytest.mark.parametrize("noted", ['{"unet.lora_alpha": NaN}', '{"unet.r": 1e-320}', "[]", "[1"])
def test_a_senseless_alpha_is_refused(make, tmp_path, noted):
    path = make(LORA).save_learned(tmp_path / "lora.safetensors")
    save_file(load_file(path), path, {"lora_adapter_metadata": noted})
    with pytest.raises(ValueError, match="lora_adapter_metadata cannot be read"):
        make(LORA, weights=str(path))


def test_odd_files_are_one_line(make, tmp_path):
    guidance = make(LORA)
    path = guidance.save_learned(tmp_path / "lora.safetensors")
    twice = {f"unet.{name}": v.clone() for name, v in guidance.lora.state_dict().items()}
    save_file(load_file(path) | twice, path)
    with pytest.raises(ValueError, match="not a LoRA of the attention"):
        make(LORA, weights=str(path))
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match="see 'x'"):
        make(LORA, weights=str(path))


def test_an_embedding_is_taken_back(make, tmp_path):
    guidance = trained(make(EMBEDDING))
    path = guidance.save_learned(tmp_path / "embedding.safetensors")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("learnable_embedding"), guidance.learnable_embedding)
        assert file.metadata()["model"] == guidance.cfg.pretrained_model_name_or_path
    again = make(EMBEDDING, weights=str(path))
    again.initialize(random_prompt())  # which shall not start it anew
    assert torch.equal(again.learnable_embedding, guidance.learnable_embedding)
    assert not torch.equal(again.learnable_embedding, random_prompt().uncond_text_embeddings[0])


def moved(path):
    with safe_open(path, "pt") as file:
        return float(file.metadata()["moved"])


def test_the_file_of_an_embedding_says_how_far_it_has_moved(make, tmp_path):
    guidance = make(EMBEDDING)
    guidance.initialize(random_prompt())
    assert moved(guidance.save_learned(tmp_path / "start.safetensors")) == 0
    with torch.no_grad():
        guidance.learnable_embedding.mul_(1.25)
    path = guidance.save_learned(tmp_path / "moved.safetensors")
    assert moved(path) == pytest.approx(0.25, rel=1e-5)
    again = make(EMBEDDING, weights=str(path))  # from the same text, whatever it started from
    again.initialize(random_prompt())
    assert moved(again.save_learned(tmp_path / "again.safetensors")) == pytest.approx(0.25)


def test_the_file_of_a_lora_says_how_large_it_is_beside_the_model(make, tmp_path):
    guidance = make(LORA, lora_scale=0.5)
    assert moved(guidance.save_learned(tmp_path / "start.safetensors")) == 0
    update = weights = 0.0
    with torch.no_grad():
        for name, layer in guidance.lora_model.lora_network().named_modules():
            if hasattr(layer, "lora_A"):
                A, B = (guidance.lora.get_submodule(f"{name}.lora_{x}").weight for x in "AB")
                B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(0)))
                update += float((B @ A).square().sum())
                weights += float(layer.base_layer.weight.square().sum())
    path = guidance.save_learned(tmp_path / "moved.safetensors")
    assert moved(path) == pytest.approx(0.5 * (update / weights) ** 0.5, rel=1e-4)


def test_a_checkpoint_still_serves_as_weights(make, tmp_path):
    guidance = trained(make(EMBEDDING))
    state = {f"guidance.{name}": value for name, value in guidance.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 0, "global_step": 8}, tmp_path / "last.ckpt")
    again = make(EMBEDDING, weights=f"{tmp_path}/last.ckpt:guidance")
    assert torch.equal(again.learnable_embedding, guidance.learnable_embedding)


def test_what_does_not_fit_is_refused(make, tmp_path):
    lora = make(LORA).save_learned(tmp_path / "lora.safetensors")
    embedding = make(EMBEDDING).save_learned(tmp_path / "embedding.safetensors")
    assert make(SDS).save_learned(tmp_path / "nothing") is None
    assert not (tmp_path / "nothing").exists()

    def changed(name, change):
        tensors = load_file(lora)
        change(tensors)
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    first = next(iter(load_file(lora)))
    nan = changed("nan", lambda t: t[first].fill_(float("nan"))).rename(tmp_path / "n.safetensors")
    less = changed("less.safetensors", lambda t: t.pop(first))
    more = changed("more.safetensors", lambda t: t.update({"text_encoder.x": torch.ones(1)}))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(lora.read_bytes()[:-100])
    note = tmp_path / "note.safetensors"
    save_file(load_file(lora), note, {"lora_adapter_metadata": "[1"})
    for name, fields, text in [
        (LORA, {"weights": tmp_path / "none.safetensors"}, "none.safetensors"),
        (LORA, {"weights": embedding}, "not a LoRA of the attention .* 'learnable_embedding'"),
        (LORA, {"weights": lora, "lora_rank": 8}, "its rank is 4, see lora_rank"),
        (LORA, {"weights": lora, "lora_scale": 0.0}, "lora_scale must not be 0"),
        (LORA, {"weights": nan}, "not finite"),
        (LORA, {"weights": less}, "not a LoRA of the attention .* '" + first),
        (LORA, {"weights": more}, "'text_encoder.x'"),
        (LORA, {"weights": damaged}, "cannot be read as safetensors"),
        (LORA, {"weights": note}, "lora_adapter_metadata cannot be read"),
        (EMBEDDING, {"weights": lora}, r"a learnable_embedding of \(16, 32\) is wanted"),
        (SDS, {"weights": lora}, "learns nothing"),
    ]:
        fields["weights"] = str(fields["weights"])
        with pytest.raises(ValueError, match=text) as caught:
            make(name, **fields)
        assert "\n" not in str(caught.value), text


@pytest.mark.parametrize("name", [EMBEDDING, LORA])
def test_a_pickle_is_not_read(make, tmp_path, name):
    bomb = Bomb(tmp_path / "exploded")
    for path in (bomb.save(tmp_path / "a.safetensors"), bomb.pickle(tmp_path / "b.safetensors")):
        with pytest.raises(ValueError, match="cannot be read as safetensors") as caught:
            make(name, weights=str(path))
        assert one_line(caught) and not bomb.exploded()


def test_one_model_has_one_name(make, tmp_path, monkeypatch):
    """A file that names the folder of a card was learned on that card's model."""
    path = make(EMBEDDING).save_learned(tmp_path / "embedding.safetensors")
    module = importlib.import_module("lods.methods.learning")
    names = {"a/folder": "a-card"}
    monkeypatch.setattr(module, "noted", lambda name: names.get(name, name))
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    guidance = make(EMBEDDING)
    monkeypatch.setattr(type(guidance.method), "learned_on", "a-card")
    monkeypatch.setattr(guidance.method, "read_learned", lambda path: {"model": "a/folder"})
    guidance.load_learned(path)
    assert said == []
    monkeypatch.setattr(guidance.method, "read_learned", lambda path: {"model": "another"})
    guidance.load_learned(path)
    assert len(said) == 1


def test_another_models_file_is_warned_about(make, tiny_sd, tmp_path, monkeypatch):
    path = make(EMBEDDING).save_learned(tmp_path / "embedding.safetensors")
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    make(EMBEDDING, weights=str(path))
    assert said == []
    other = tiny_sd(seed=1)
    make(EMBEDDING, weights=str(path), pretrained_model_name_or_path=other)
    assert len(said) == 1 and "was learned on" in said[0] and other in said[0]


@pytest.mark.parametrize("name", [EMBEDDING, LORA])
def test_a_file_is_whole_or_the_old_one(make, tmp_path, monkeypatch, name):
    path = make(name).save_learned(tmp_path / "prior.safetensors")
    before = path.read_bytes()

    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="No space left"):
        make(name).save_learned(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
