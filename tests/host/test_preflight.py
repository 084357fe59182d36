"""What is refused before torch is imported, by launch.py itself and by extensions' preflight.py."""

import os
import socket
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tests.runs import ROOT, launch
from threestudio.run.preflight import preflight
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension

EXTENSION = ROOT / "custom" / "threestudio-lods"
CONFIG = str(ROOT / "configs" / "lods-gs-embedding.yaml")
SD15, SDXL = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
)
CAPTURED = {"capture_output": True, "text": True}
HEAVY = {"torch", "numpy", "pytorch_lightning", "diffusers", "transformers"}


def run(*command, cwd=ROOT, **env):
    """A fresh process without the settings of the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    env = {**kept, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, **CAPTURED)


# --- the command ---


@pytest.mark.parametrize("offline", [False, True])
def test_a_missing_card_is_one_line_and_nothing_heavy_is_imported(tmp_path, offline):
    words = [CONFIG, "--train", "system.prompt_processor.prompt=a car", "use_timestamp=false"]
    words.append("system.prompt_processor.pretrained_model_name_or_path=sd15")
    env = {"HF_HUB_OFFLINE": "1"} if offline else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    env["HF_HUB_CACHE"] = str(tmp_path)
    script = str(ROOT / "launch.py")
    done = run("-X", "importtime", script, "--config", *words, cwd=tmp_path, **env)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == "" and len(said) == 1
    assert said[0].startswith("error: the model 'sd15' cannot be had: " + SD15)
    assert f"hf download {SD15};" in said[0]
    assert ("HF_HUB_OFFLINE is set" if offline else "no network: 127.0.0.1") in said[0]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "huggingface_hub" in imported and not imported & HEAVY
    assert not os.listdir(tmp_path)


def test_mistakes_in_a_config_come_as_early(tmp_path):
    code = "import sys, launch\nprint(launch.main(sys.argv[1:]))\n"
    code += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    for words, line in (
        (["--train"], "error: system.prompt_processor.prompt is missing: add"),
        (["--train", "sede=1", "system.prompt_processor.prompt=x"], "'sede': did you mean 'seed'"),
        (["--test", "system.prompt_processor.prompt=x"], "--test needs a trained model: add res"),
    ):
        done = run("-c", code, "--config", CONFIG, *words, cwd=tmp_path)
        assert done.stdout.splitlines() == ["2", "[]"] and line in done.stderr


# --- the hook ---


@pytest.fixture
def custom(tmp_path):
    """``custom(name, text)`` writes an extension with a preflight.py, whose __init__ fails."""

    def write(name, text, root="custom"):
        folder = tmp_path / root / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('the package was imported')")
        (folder / "preflight.py").write_text(text)

    (tmp_path / "run.yaml").write_text("{data_type: d, system_type: s, system: {x: 3}}")
    return write


def check(tmp_path, mode="train", roots=("custom",), overrides=(), **options):
    roots = [tmp_path / root for root in roots]
    preflight([str(tmp_path / "run.yaml")], overrides, mode, roots, **options)


def test_an_extension_sees_config_and_mode_and_may_refuse(custom, tmp_path, capfd):
    refusal = "raise ValueError(f'{mode}: x is\\n{cfg.system.x}')"
    custom("h-a", f"def preflight(cfg, mode):\n    if cfg.system.x > 2: {refusal}")
    custom("h-b", "raise SystemExit('not reached')")
    custom("h-none", "")
    (tmp_path / "custom" / "h-none" / "preflight.py").unlink()
    for mode, overrides in (("train", []), ("export", ["resume=x"])):
        with pytest.raises(UserError) as caught:
            check(tmp_path, mode, overrides=overrides)
        assert str(caught.value) == f"{mode}: x is 3"
    (tmp_path / "custom" / "h-b" / "preflight.py").unlink()
    check(tmp_path, overrides=["system.x=2"], verbose=True)
    assert capfd.readouterr() == ("", "")
    assert not [name for name in sys.modules if "h-a" in name]


def test_what_fails_in_a_preflight_is_left_to_the_run(custom, tmp_path, capfd):
    broken = ["import nothing_of_that_name", "raise ValueError('while it is read')", "x = ", ""]
    # the last is OmegaConf's, and a ValueError
    for call in ("1 / 0", "cfg.system.x.y", "cfg.system.x = object()"):
        broken.append(f"def preflight(cfg, mode):\n    {call}")
    for i, text in enumerate(broken):
        custom(f"h-{i}", text)
    custom("h-x", "def preflight(cfg, mode): cfg.system.x = 4")
    path = str(tmp_path / "told")
    custom("h-y", f"def preflight(cfg, mode): open({path!r}, 'a').write(str(cfg.system.x))")
    refusal = "def preflight(cfg, mode): raise ValueError"
    custom("h-z_disabled", refusal)
    custom("h-y", refusal, root="other")  # of two extensions with one name the first is loaded
    check(tmp_path, roots=("custom", "other", "nowhere"))
    assert (tmp_path / "told").read_text() == "3"
    out, err = capfd.readouterr()
    told = err.splitlines()
    assert out == "" and len(told) == len(broken)
    for i, line in enumerate(told):
        assert line.startswith(f"{tmp_path}/custom/h-{i}/preflight.py was left out: ")
    assert told[4].endswith("left out: ZeroDivisionError: division by zero")
    check(tmp_path, verbose=True)
    err = capfd.readouterr().err
    assert err.count("Traceback") >= len(broken) and "UnsupportedValueType" in err


def test_an_extension_may_bring_a_resolver_and_a_config_may_be_a_pipe(tmp_path):
    (tmp_path / "run.yaml").write_text("{data_type: d, system_type: s, seed: '${h_mine:1}'}")
    check(tmp_path)
    preflight([os.devnull], [], "train", [])  # it would be empty at a second reading


def test_the_run_goes_on_after_a_broken_preflight(custom, tmp_path, monkeypatch, capfd):
    custom("h-broken", "1 / 0")
    (tmp_path / "custom" / "h-broken" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    asked = ("--extensions", "custom")
    assert launch(["run.yaml"], ["use_timestamp=false", "tag=t"], "--train", *asked) == 2
    err = capfd.readouterr().err
    left_out, error = err.splitlines()
    assert "h-broken/preflight.py was left out: ZeroDivisionError" in left_out
    assert "no module is registered as 'd'" in error
    custom("h-refuses", "def preflight(cfg, mode): raise ValueError(mode)")
    assert launch(["run.yaml"], ["resume=x"], "--test", *asked) == 2
    assert capfd.readouterr().err.endswith("ZeroDivisionError: division by zero\nerror: test\n")


# --- this extension's ---


@pytest.fixture
def asked(lods, tmp_path, monkeypatch):
    """``asked(model, ...)`` raises what the extension's preflight says; there is no network, and
    sd15 is in the hub's local cache."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "hub" / f"models--{SD15.replace('/', '--')}"
    for file, text in (("refs/main", "c" * 40), (f"snapshots/{'c' * 40}/unet/config.json", "{}")):
        (cached / file).parent.mkdir(parents=True)
        (cached / file).write_text(text)
    check = load_extension(EXTENSION, submodule="preflight").preflight
    ids = "pretrained_model_name_or_path"

    def ask(model, mode="train", system_type="lods-gs-system", lora=None, **system):
        parts = {"guidance_type": "lods-embedding-guidance", "prompt_processor": {ids: model}}
        parts |= {"guidance": {ids: model, f"{ids}_lora": lora}, **system}
        check(OmegaConf.create({"system_type": system_type, "system": parts}), mode)

    return ask


def test_cards_that_cannot_be_had_are_refused(asked):
    for mode in ("train", "validate", "test", "export"):
        with pytest.raises(ValueError, match=f"'sdxl' cannot be had: {SDXL} .*hf download {SDXL};"):
            asked("sdxl", mode)
    with pytest.raises(ValueError, match="'sdxl' cannot be had"):  # by the guidance
        asked("sdxl", prompt_processor_type="stable-diffusion-prompt-processor")
    for kind in ("lora", "vsd"):
        with pytest.raises(ValueError, match="'sd21' cannot be had"):
            asked("sd15", lora="sd21", guidance_type=f"lods-{kind}-guidance")


def test_a_distilled_card_is_refused_before_it_would_be_downloaded(asked):
    said = "system.guidance_type=lods-sds-guidance needs a null prediction: flux1-dev was .* take o"
    for model in ("flux1-dev", "black-forest-labs/FLUX.1-dev"):
        with pytest.raises(ValueError, match=said) as error:
            asked(model, guidance_type="lods-sds-guidance")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="'flux1-dev' cannot be had"):  # a method of others
        asked("flux1-dev", guidance_type="stable-diffusion-guidance")


def test_names_of_nothing_and_hub_ids_out_of_reach_are_refused(asked):
    for model in ("SD15", "sd1.5", "sd-15"):
        with pytest.raises(ValueError, match=f"no card '{model}' .did you mean 'sd15'"):
            asked(model)
    for model in ("./nowhere", "/data/sd/", "nowhere"):
        with pytest.raises(ValueError, match=f"no card '{model}', seen from .* one of sd15, "):
            asked(model)
    with pytest.raises(ValueError, match=r"'nobody/model' cannot be had: nobody/model is .*OFFL"):
        asked("nobody/model")


def test_what_can_be_had_or_is_not_known_is_left_to_the_run(asked):
    os.makedirs("folder/that_may_be_a_model")
    for model in (
        "pocket-shapes",
        "sd15",
        SD15,
        "folder/that_may_be_a_model",
        "folder",
        "",
        None,
        3,
    ):
        asked(model, lora="sdxl")  # which this guidance does not load
    asked("sdxl", system_type="dreamfusion-system")
    others = {"guidance_type": "stable-diffusion-guidance"}
    asked("sdxl", prompt_processor_type="lods-prompt-processor:mine", **others)
    os.makedirs("sdxl/unet")
    asked("sdxl")


def test_where_there_is_a_network_the_hub_is_not_asked(asked, monkeypatch):
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        asked("sdxl")
    with pytest.raises(ValueError, match="no network: 127"):
        asked("sdxl")
