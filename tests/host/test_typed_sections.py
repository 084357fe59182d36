"""Settings that one type of a part knows only: into its section, or left out."""

import pytest
from omegaconf import OmegaConf

from tests.runs import ROOT, launch, small_run
from threestudio.utils.config import load_config
from threestudio.utils.errors import UserError

CONFIGS = ROOT / "configs"
BASE = """
system_type: lods-gs-system
system:
  guidance_type: ${other}
  guidance: {guidance_scale: 1.0}
other: x-guidance
"""


def load(*files, cli=(), known=("other",)):
    """The merged ``system``; the keys ``known`` are no fields of an experiment."""
    from threestudio.utils.typed_sections import merge_layers

    layers = [OmegaConf.create(text) for text in files]
    return OmegaConf.to_container(
        merge_layers([*layers, OmegaConf.from_dotlist(list(cli))]), resolve=True
    )["system"]


def test_the_settings_of_the_chosen_type_are_taken_and_those_of_others_left_out():
    overlay = "system: {guidance_for: {x-guidance: {a: 1}, y-guidance: {b: 2}}}"
    assert load(BASE, overlay)["guidance"] == {"guidance_scale": 1.0, "a": 1}
    chosen = load(BASE, overlay, cli=["system.guidance_type=y-guidance"])
    assert chosen["guidance"] == {"guidance_scale": 1.0, "b": 2}
    assert load(BASE, overlay, cli=["other=z-guidance"])["guidance"] == {"guidance_scale": 1.0}
    assert "guidance_for" not in chosen


def test_they_go_over_their_own_file_and_under_later_ones():
    overlay = "system: {guidance: {a: 1, b: 1}, guidance_for: {x-guidance: {a: 2, b: 2, c: 2}}}"
    later = "system: {guidance: {b: 3}}"
    merged = load(BASE, overlay, later, cli=["system.guidance.c=4"])
    assert merged["guidance"] == {"guidance_scale": 1.0, "a": 2, "b": 3, "c": 4}


def test_a_whole_system_may_have_its_own():
    overlay = "system_for: {lods-gs-system: {strategy: {name: none}}, other-system: {x: 1}}"
    assert load(BASE, overlay)["strategy"] == {"name": "none"}
    assert "x" not in load(BASE, overlay)
    other = load(BASE, overlay, cli=["system_type=other-system"])
    assert other["x"] == 1 and "strategy" not in other


def test_the_layers_stay_as_they_were():
    from threestudio.utils.typed_sections import merge_layers

    layers = [OmegaConf.create(BASE), OmegaConf.create("system: {guidance_for: {x-guidance: {}}}")]
    before = [layer.copy() for layer in layers]
    merge_layers(layers)
    assert layers == before


@pytest.mark.parametrize(
    "overlay, text",
    [
        ("system: {guidance_for: 3}", r"system\.guidance_for takes a mapping"),
        ("system: {guidance_for: {x-guidance: 3}}", r"guidance_for\.x-guidance takes a mapping"),
    ],
)
def test_what_is_no_mapping_is_refused(overlay, text):
    with pytest.raises(UserError, match=text):
        load(BASE, overlay)


# --- the shipped overlays, with other types than ours ---

OVERLAYS = {
    "lods-gs-embedding.yaml": "pocket.yaml",
    "lods-ngp-lora.yaml": "pocket-ngp.yaml",
}


def shipped(base, *overrides, extra=()):
    files = [str(CONFIGS / base), str(CONFIGS / OVERLAYS[base]), *map(str, extra)]
    return load_config(*files, cli_args=["system.prompt_processor.prompt=x", *overrides]).system


@pytest.mark.parametrize("base", OVERLAYS)
def test_the_shipped_overlays_name_no_field_that_one_method_only_knows(base, lods):
    import threestudio

    types = ["system.guidance_type=stable-diffusion-guidance"]
    types += ["system.prompt_processor_type=stable-diffusion-prompt-processor"]
    cfg = shipped(base, *types)
    for name in ("guidance", "prompt_processor"):
        fields = threestudio.find(cfg[f"{name}_type"]).Config.__dataclass_fields__
        assert set(cfg[name]) <= set(fields)


@pytest.mark.parametrize("base, start", zip(OVERLAYS, (200, 300), strict=True))
def test_the_bridge_gets_its_own(base, start, lods):
    cfg = shipped(base, "system.guidance_type=lods-bridge-guidance")
    assert (cfg.guidance.bridge_start, cfg.guidance.bridge_sds_scale) == (start, 5.0)
    assert cfg.prompt_processor.source_prompt == "a 3d render"
    now = shipped(
        base, "system.guidance_type=lods-bridge-guidance", "system.guidance.bridge_start=7"
    )
    assert now.guidance.bridge_start == 7


def test_the_hosts_guidance_trains_with_the_shipped_overlay(tmp_path, monkeypatch, tiny_sd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    files = [str(CONFIGS / "lods-gs-embedding.yaml"), str(CONFIGS / "pocket-shapes.yaml")]
    types = ["system.guidance_type=stable-diffusion-guidance"]
    types += ["system.prompt_processor_type=stable-diffusion-prompt-processor"]
    more = ["system.geometry.ball.n_points=60", "trainer.limit_test_batches=0"]
    assert launch(files, [*small_run(tiny_sd()), *types, *more]) == 0


@pytest.mark.parametrize(
    "overlay, text",
    [
        ("guidance: {bridge_strat: 3}", r"system\.guidance\.bridge_strat'?: did you mean 'bridge_"),
        (
            "guidance_for: {lods-bridge-guidance: {bridge_strat: 3}}",
            r"system\.guidance\.bridge_strat'?: did you mean 'bridge_",
        ),
        (
            "guidance_for: {lods-brigde-guidance: {bridge_start: 3}}",
            "names the type 'lods-brigde-guidance', which is not registered: did you mean 'lods-b",
        ),
        ("guidence_for: {lods-bridge-guidance: {}}", r"has no field 'system\.guidence_for'"),
    ],
)
def test_misspelt_keys_are_still_errors(tmp_path, overlay, text, lods):
    import threestudio

    file = tmp_path / "overlay.yaml"
    file.write_text(f"system: {{{overlay}}}")
    with pytest.raises(UserError, match=text):
        cfg = shipped(
            "lods-gs-embedding.yaml", "system.guidance_type=lods-bridge-guidance", extra=[file]
        )
        threestudio.find(cfg.guidance_type)(cfg.guidance)
        threestudio.find("lods-gs-system")(cfg)
