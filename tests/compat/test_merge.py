"""``custom/threestudio-lods/merge.py``: one YAML for upstream's launcher."""

import dataclasses
import importlib
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tests.runs import ROOT
from tests.surface_fields import CONFIGS
from threestudio.utils.config import load_config

SCRIPT = ROOT / "custom" / "threestudio-lods" / "merge.py"
PAIRS = [
    (f"lods-{backbone}-{learned}.yaml", overlay)
    for backbone, overlay in (("gs", "pocket-shapes.yaml"), ("ngp", "pocket-shapes-ngp.yaml"))
    for learned in ("embedding", "lora")
]


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("lods.merge")


def paths(*names):
    return [str(ROOT / "configs" / name) for name in names]


def resolved(files, *overrides):
    cfg = load_config(*files, cli_args=[*overrides, "use_timestamp=false"])
    return OmegaConf.to_container(cfg)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_merged_file_is_what_the_files_are_together(tool, tmp_path, pair):
    out = str(tmp_path / "merged.yaml")
    assert tool.main([*paths(*pair), "-o", out, "--keep"]) == 0
    options = ["system.prompt_processor.prompt=a red car", "trainer.max_steps=7"]
    for more in ([], ["system.guidance.max_step_percent=0.5"]):
        assert resolved([out], *options, *more) == resolved(paths(*pair), *options, *more)
    # overrides still reach what is derived from them
    assert resolved([out], *options)["checkpoint"]["every_n_train_steps"] == 7
    assert resolved([out], *options)["tag"] == "a_red_car"


@pytest.mark.parametrize("kind", ["lods-bridge-guidance", "lods-sds-guidance"])
def test_settings_of_the_type_that_is_chosen_here(tool, kind):
    merged = tool.merge(paths(*PAIRS[0]), [f"system.guidance_type={kind}"])
    assert ("bridge_start" in merged.system.guidance) == (kind == "lods-bridge-guidance")
    assert not [key for key in merged.system if key.endswith("_for")]


def test_keys_with_dots_can_be_overridden(tool):
    merged = tool.merge(paths(*PAIRS[0]), ["system.optimizer.params.geometry.means.lr=0.5"])
    assert merged.system.optimizer.params["geometry.means"].lr == 0.5
    assert "geometry" not in merged.system.optimizer.params


@pytest.mark.parametrize("pair", PAIRS)
def test_upstream_gets_what_it_knows(tool, pair, capsys, lods, tmp_path):
    import threestudio

    out = tmp_path / "merged.yaml"
    assert tool.main([*paths(*pair), "-o", str(out)]) == 0
    merged = OmegaConf.load(out)
    assert merged.system.get("exporter", {}).get("fmt") in (None, "obj-mtl", "obj")
    assert ("exporter.fmt is now obj-mtl" in capsys.readouterr().err) == ("ngp" in pair[0])
    own = set(threestudio.find(merged.system_type).Config.__dataclass_fields__)
    hosts = own - set(CONFIGS["threestudio.systems.base:BaseLift3DSystem"])
    assert not set(merged.system) & hosts & {"on_nonfinite", "max_skipped_steps"}


def config_of(name):
    import threestudio

    if ":" not in name:
        return threestudio.find(name).Config
    module, kind = name.split(":")
    found = getattr(importlib.import_module(module), kind)
    return found if dataclasses.is_dataclass(found) else found.Config


SECTIONS = {  # ends of registered names -> the section of a config
    "DataModuleConfig": "data",
    "BaseLift3DSystem": "system",
    "-system": "system",
    "-renderer": "system.renderer",
    "-guidance": "system.guidance",
    "-prompt-processor": "system.prompt_processor",
    "-exporter": "system.exporter",
    "-material": "system.material",
    "-background": "system.background",
    "-volume": "system.geometry",
    "-grid": "system.geometry",
}


def test_every_field_that_only_the_host_has_is_left_out(tool):
    """A field that is added to a class of the host needs a line in the command's table."""
    import threestudio

    names = [n for n in CONFIGS if n in threestudio.__modules__ or n.endswith("Lift3DSystem")]
    names.remove("dummy-prompt-processor")  # which takes, and ignores, all fields
    names.remove("perceptual-loss")  # which is not a part of a system
    names += [name for name in CONFIGS if name.endswith("DataModuleConfig")]
    found = set()
    for name in names:
        section = next(s for end, s in SECTIONS.items() if name.endswith(end))
        ours = {f.name for f in dataclasses.fields(config_of(name))}
        for field in ours - set(CONFIGS[name]) - {"weights"}:  # which upstream's BaseModule has
            found.add(f"{section}.{field}")
            assert tool.HOST_ONLY.get(f"{section}.{field}", "absent") in (None, name)
    nested = {"data.random_camera.rays", "system.geometry.pos_encoding_config.backend"}
    assert found | nested == {key for key in tool.HOST_ONLY if not key.startswith("trainer.")}


def test_what_upstream_does_not_know_is_left_out(tool, tmp_path, capsys):
    file, out = tmp_path / "in.yaml", tmp_path / "out.yaml"
    file.write_text(
        "data: {rays: false, width: 3}\n"
        "system: {renderer_type: nerf-volume-renderer, on_nonfinite: skip,\n"
        "  renderer: {backend: cpu, radius: 1.0}, exporter: {fmt: ply}}\n"
        "trainer: {accelerator: cpu, max_steps: 3}\n"
    )
    assert tool.main([str(file), "-o", str(out)]) == 0
    said = capsys.readouterr().err
    assert OmegaConf.load(out) == {
        "data": {"width": 3},
        "system": {
            "renderer_type": "nerf-volume-renderer",
            "renderer": {"radius": 1.0},
            "exporter": {"fmt": "obj"},
        },
        "trainer": {"max_steps": 3},
    }
    for key in ("data.rays", "system.renderer.backend", "system.on_nonfinite", "accelerator"):
        assert key in said
    mine = OmegaConf.create({"system": {"renderer_type": "x", "renderer": {"backend": "cpu"}}})
    assert tool.for_upstream(mine) == (mine, [])


@pytest.mark.parametrize(
    "content, text",
    [
        (None, "cannot be read"),
        ("- 1", "is not a YAML mapping"),
        ("a: [", "is not valid YAML"),
        ("system: 3", "cannot be merged"),
    ],
)
def test_mistakes_are_one_line(tool, tmp_path, capsys, content, text):
    file = tmp_path / "overlay.yaml"
    if content is not None:
        file.write_text(content)
    out = tmp_path / "out.yaml"
    assert tool.main([*paths(PAIRS[0][0]), str(file), "-o", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and text in lines[0]
    assert not out.exists()


def test_a_file_that_is_merged_is_not_written_over(tool, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\n")
    assert tool.main([str(file), "-o", str(file)]) == 2
    assert file.read_text() == "a: 1\n" and "one of the files" in capsys.readouterr().err


def test_it_needs_omegaconf_only(tmp_path):
    """As in upstream's environment, whatever is there: nothing of this repository is imported."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['merge.py', {str(paths(PAIRS[0][0])[0])!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'threestudio', 'pytorch_lightning'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "name: lods-gs-embedding" in done.stdout


def test_a_format_that_this_threestudio_lacks_is_refused_before_training(lods, monkeypatch):
    import threestudio

    system = threestudio.find("lods-ngp-system")
    monkeypatch.delattr(threestudio.find("mesh-exporter"), "formats")  # upstream has none
    cfg = {"exporter_type": "mesh-exporter", "exporter": {"fmt": "glb"}}
    with pytest.raises(ValueError, match=r"mesh-exporter writes obj-mtl, obj$"):
        system(cfg)
