"""The texts that some methods compare the prompt with, of ``lods-prompt-processor``."""

import pytest
import torch
from lods.cameras import Cameras

import threestudio
from tests.guidance_oracles import random_prompt
from threestudio import find


@pytest.fixture
def processor(lods, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threestudio, "warn", lambda *a: None)  # of words that the model lacks

    def build(name="lods-prompt-processor", **fields):
        model = tiny_sd(tokens=24)
        return find(name)(
            {"pretrained_model_name_or_path": model, "prompt": "a red car", **fields}
        )()

    return build


@pytest.mark.parametrize("style", [True, False])
def test_the_source_is_the_prompt_of_the_view_and_its_suffix(processor, monkeypatch, style):
    fields = {"view_dependent_prompt_front": style, "source_suffix": " of a yellow house"}
    utils = processor(prompt_back="a green chair", **fields)
    kind, state = find("lods-prompt-processor"), torch.get_rng_state()
    encode = kind.encode  # which may draw, where an encoder is made before it is filled
    monkeypatch.setattr(
        kind, "encode", lambda self, t: torch.rand(9) is not None and encode(self, t)
    )
    source = utils.other_text("source")
    assert torch.equal(torch.get_rng_state(), state)
    want = processor(
        prompt="a red car of a yellow house",
        **{
            f"prompt_{d.name}": f"{text} of a yellow house"
            for d, text in zip(utils.directions, utils.prompts_vd)
        },
    )
    assert torch.equal(source.text_embeddings, want.text_embeddings)
    assert torch.equal(source.text_embeddings_vd, want.text_embeddings_vd)
    assert not torch.equal(source.text_embeddings_vd, utils.text_embeddings_vd)


def test_a_source_prompt_replaces_the_whole(processor):
    utils = processor(source_prompt="a blue horse", prompt_back="a green chair")
    want = processor(prompt="a blue horse")
    got = utils.other_text("source")
    assert torch.equal(got.text_embeddings_vd, want.text_embeddings_vd)  # with words for the view
    empty = processor(source_prompt="", negative_prompt="a photo").other_text("source")
    null = processor().uncond_text_embeddings
    assert torch.equal(empty.text_embeddings, null)
    assert torch.equal(empty.text_embeddings_vd, null.expand(4, -1, -1))


def test_the_text_of_bad_pictures_is_the_same_for_all_views(processor):
    utils = processor(nfsd_negative_prompt="a photo of a house")
    want = processor(negative_prompt="a photo of a house").uncond_text_embeddings
    got = utils.other_text("nfsd_negative")
    assert torch.equal(got.text_embeddings, want)
    assert torch.equal(got.text_embeddings_vd, want.expand(4, -1, -1))


def test_other_texts_are_embedded_when_asked_for(processor, monkeypatch):
    kind, texts = find("lods-prompt-processor"), []
    encode = kind.encode
    monkeypatch.setattr(kind, "encode", lambda self, t: texts.extend(t) or encode(self, t))
    utils = processor()
    assert not [text for text in texts if "smooth" in text or "dull" in text]
    utils.other_text("source")
    assert sum("a red car, front view, oversaturated, smooth" in text for text in texts) == 1
    utils.other_text("nfsd_negative")
    assert sum(text.startswith("unrealistic, blurry") for text in texts) == 1


@pytest.mark.parametrize("short", ["bridge", "nfsd"])
def test_another_prompt_processor_is_not_enough(processor, tiny_sd, short):
    guidance = find(f"lods-{short}-guidance")({"pretrained_model_name_or_path": tiny_sd()})
    utils = processor("stable-diffusion-prompt-processor")
    with pytest.raises(ValueError, match="prompt_processor_type=lods-prompt-processor"):
        guidance.initialize(utils)


def test_embedding_may_start_as_the_source(lods, tiny_sd):
    prompt, model = random_prompt(), tiny_sd(sample_size=4)
    for start, want in (
        ("negative", prompt.uncond_text_embeddings[0]),
        ("source", prompt.others["source"]),
    ):
        guidance = find("lods-embedding-guidance")(
            {"pretrained_model_name_or_path": model, "embedding_start": start}
        )
        guidance.initialize(prompt)
        assert torch.equal(guidance.learnable_embedding, want)
    with pytest.raises(ValueError, match="embedding_start must be one of negative, source"):
        find("lods-embedding-guidance")({"embedding_start": "null"})


@pytest.fixture
def bridge(tiny_sd, processor):
    return find("lods-bridge-guidance")(
        {"pretrained_model_name_or_path": tiny_sd(tokens=24), "half_precision_weights": False}
    )


def test_with_perp_neg_the_source_is_between_the_views_as_the_prompt_is(bridge, processor):
    utils = processor(use_perp_neg=True, source_prompt="a blue horse")
    bridge.initialize(utils)
    views = torch.zeros(2), torch.tensor([60.0, 60.0]), torch.ones(2)
    conditions = bridge.prompts_of(utils).conditions(Cameras(*views), bridge.other_texts)
    rows = utils.other_text("source").text_embeddings_vd
    front, side = (rows[utils.direction2idx[view]] for view in ("front", "side"))
    wanted = (front / 3 + 2 * side / 3).expand(2, -1, -1)
    torch.testing.assert_close(conditions.others["source"], wanted)


def test_a_bridge_needs_two_texts(bridge, processor):
    with pytest.raises(ValueError, match="source is the prompt itself"):
        bridge.initialize(processor(source_suffix=""))
