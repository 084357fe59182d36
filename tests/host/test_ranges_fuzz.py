"""Wrong values of every config field: refused in one line that names the key, before anything is
built. What is wrong follows from a field's declaration in the first half of this file, and from a
list made by hand, of whole configs, in the second."""

import dataclasses
import inspect
import math
import re
import typing

import pytest
from omegaconf import OmegaConf

import threestudio
from tests.host.test_ranges import OPEN, config_classes
from tests.runs import ROOT
from threestudio.run.config_check import check_parts
from threestudio.utils.config import (
    ExperimentConfig,
    load_config,
    parse_overrides,
    parse_structured,
)
from threestudio.utils.errors import UserError
from threestudio.utils.ranges import TEXTS, Range, annotations, split
from threestudio.utils.typing import *

CONFIG = str(ROOT / "configs" / "{}.yaml")
ORIGINAL = ROOT / "tests" / "original"
NAN, INF = math.nan, math.inf

# --- every field of every class ---


def outside(declared):
    """Numbers that a declared range does not hold."""
    numbers = [NAN, -INF]
    if not (declared.high == INF and declared.high_included):
        numbers.append(INF)
    if math.isfinite(declared.low):
        numbers += [declared.low - 1, declared.low - 1e30]
        numbers += [] if declared.low_included else [declared.low]
    if math.isfinite(declared.high):
        numbers += [declared.high * 1.01 + 1, 1e30, 10**40]
        numbers += [] if declared.high_included else [declared.high]
    return numbers


def wrong_values(hint):
    """At least five values that a field of this annotation must not have."""
    base, beside = split(hint)
    nullable = type(None) in typing.get_args(base) or (base is Any and beside in ((), (TEXTS,)))
    wrong = [{"a": 1}, [{}], *([] if nullable else [None])]
    texts = [declared for declared in beside if isinstance(declared, str)]
    if texts == [TEXTS]:
        wrong += [3, 1.5, True, NAN, ["a", 1], [["a"]], {}]
    elif texts:
        declared = Range.parse(texts[0])
        numbers = outside(declared)
        wrong += ["no such word", [], "", True] if base is Any else ["no such word", [["x"]], {}]
        for number in numbers:
            wrong += [number, number, [number, number], [number] * 3]
            wrong.append([0, number, number, 9])
        if "scheduled" in declared.kinds:
            wrong += [[9, 0.5, 0.5, 5], [-1, 0.5, 0.5, 5], [0, 0.5, 0.5, NAN], [0.5] * 5]
        if "ordered" in declared.kinds:
            wrong.append([declared.high - 0.1, declared.low + 0.1])
    elif any(isinstance(declared, tuple) for declared in beside):
        wrong += ["no such word", "", 3.5, [1], True]
    elif base in (str, Optional[str]):
        wrong += [["a"], [["a"]], {}, [1, 2], {"a": {}}]
    elif base in (bool, Optional[bool]):
        wrong += ["perhaps", 2.5, [True], NAN, {}]
    elif base in (List[str], Optional[List[str]], Tuple[str, ...]):
        wrong += ["a", [1.5], [["a"]], 3]
    elif base in (dict, Optional[dict]):
        wrong = [3, "x", [1], True, 2.5, *([] if nullable else [None])]
    return wrong


def fields():
    """Every field once, in the class that declares it: that others inherit it is tested apart."""
    bases = dict.fromkeys(base for cls in config_classes() for base in cls.__mro__)
    for cls in filter(dataclasses.is_dataclass, bases):
        for name in inspect.get_annotations(cls):
            hint = annotations(cls)[name]
            if name not in OPEN or split(hint)[0] is dict:
                yield cls, name, hint


def alone(cls, name, hint):
    """A class with this field only: OmegaConf takes milliseconds for one with dozens of them."""
    if cls is ExperimentConfig:  # which derives values from what it is given
        return cls
    [declared] = [f for f in dataclasses.fields(cls) if f.name == name]
    default = dataclasses.field(default=declared.default, default_factory=declared.default_factory)
    return dataclasses.make_dataclass(cls.__name__, [(name, hint, default)])


def test_five_wrong_values_of_every_field_are_refused_by_name(lods):
    tried, accepted = 0, []
    for cls, name, hint in fields():
        wrong = wrong_values(hint)
        assert len(wrong) >= 5 or split(hint)[0] is Any, (cls, name, hint)
        small = alone(cls, name, hint)
        for i, value in enumerate(wrong):
            tried += 1
            section = {name: value} if cls is not ExperimentConfig else {"tag": "t", name: value}
            if i % 2:
                section = OmegaConf.create({"part": section}).part
            try:
                parse_structured(small, section)
            except UserError as error:
                message = str(error)
                assert name in message and "\n" not in message and len(message) < 700, message
            else:
                accepted.append((cls.__qualname__, name, value))
    assert not accepted, accepted
    assert tried > 3000


# --- the same for whole configs, by hand ---

GS, NGP = "lods-gs-lora", "lods-ngp-embedding"
REFUSED = {
    GS: """
seed=-1 seed=1.5 seed=1e20
data.width=0 data.width=-1 data.width=1e9 data.width=64.5 data.width=[] data.width=[64,0]
data.height=.nan data.height=a
data.batch_size=0 data.batch_size=-4 data.batch_size=1e9 data.batch_size=true
data.eval_width=0 data.eval_height=-1 data.eval_batch_size=0 data.n_val_views=0
data.n_test_views=0 data.n_test_views=1e9 data.resolution_milestones=[9,5]
data.fovy_range=[0,0] data.fovy_range=[-10,40] data.fovy_range=[40,180] data.fovy_range=[70,40]
data.fovy_range=[.nan,40] data.fovy_range=[40] data.fovy_range=50 data.eval_fovy_deg=0
data.eval_fovy_deg=.nan data.eval_fovy_deg=180 data.eval_fovy_deg=-30
data.camera_distance_range=[0,0] data.camera_distance_range=[-2,3]
data.camera_distance_range=[4,3] data.camera_distance_range=[1,.inf]
data.camera_distance_range=[a,b] data.eval_camera_distance=0 data.eval_camera_distance=-1
data.eval_camera_distance=.inf data.elevation_range=[-100,45] data.elevation_range=[10]
data.eval_elevation_deg=.inf data.azimuth_range=[.nan,.nan] data.azimuth_range=[-1e9,1e9]
data.camera_perturb=-1 data.center_perturb=.inf data.up_perturb=.nan
data.light_distance_range=[2,1] data.light_position_perturb=-.inf data.progressive_until=-5
data.light_sample_strategy=sun
system.renderer.near_plane=0 system.renderer.near_plane=-1 system.renderer.near_plane=.nan
system.renderer.near_plane=.inf system.renderer.far_plane=-1 system.renderer.far_plane=.nan
system.renderer.far_plane=0.001 system.renderer.eps2d=0 system.renderer.eps2d=-0.3
system.renderer.eps2d=.nan system.renderer.eps2d=.inf system.renderer.radius=0
system.renderer.backend=cpuu system.renderer.near_plane=[0,1,2,3]
system.geometry.sh_degree=4 system.geometry.sh_degree=-1 system.geometry.init_opacity=0
system.geometry.init_opacity=1 system.geometry.init_opacity=.nan system.geometry.init_scale=0
system.geometry.init_scale=-1 system.geometry.init_type=balls system.geometry.init_seed=-1
system.geometry.ball.n_points=0 system.geometry.ball.n_points=1e12
system.geometry.ball.radius=0 system.geometry.ball.radius=.nan system.geometry.shap_e.scale=0
system.geometry.shap_e.num_steps=0 system.geometry.shap_e.vertex_stride=0
system.geometry.shap_e.growth_points=-1 system.geometry.file.radius=-1
system.strategy.name=defualt system.strategy.scene_scale=0
system.strategy.default.refine_every=0 system.strategy.default.prune_opa=2
system.strategy.default.grow_grad2d=.nan system.strategy.mcmc.cap_max=0
system.strategy.mcmc.noise_lr=-1
system.background.color=[255,255,255] system.background.color=[1,1]
system.background.color=[.nan,0,0] system.background.color=1 system.background.random_aug_prob=2
system.guidance.guidance_scale=0 system.guidance.guidance_scale=-7 system.guidance.lora_rank=0
system.guidance.guidance_scale=.nan system.guidance.min_step_percent=-0.1
system.guidance.max_step_percent=1.1 system.guidance.max_step_percent=[0,0.9,.nan,9]
system.guidance.max_step_percent=[9,0.9,0.5,3] system.guidance.max_step_percent=[0,0.9]
system.guidance.max_step_percent=[0,0.9,5,9] system.guidance.min_step_percent=0.99
system.guidance.grad_clip=0 system.guidance.grad_clip=[0,1,-1,9] system.guidance.lora_scale=0
system.guidance.lora_scale=.nan system.guidance.sds_steps=-1 system.guidance.prior_inner_lr=0
system.guidance.lora_n_timestamp_samples=0 system.guidance.timestep_schedule=monotone
system.prompt_processor.front_threshold=.nan
system.sheet_views=1e12 system.sheet_views=-1 system.sheet_columns=0 system.video_fps=0
system.video_fps=1e9 system.max_skipped_steps=0 system.on_nonfinite=go
system.loss.lambda_sds=.inf system.loss.lambda_sds=a system.loss.lambda_sparsity=[0,1]
system.loss.lambda_sparsity=[0,1,.inf,9]
system.optimizer.args.betas=[2,0.9] system.optimizer.args.betas=[0.9,1] system.optimizer.args.lr=-1
system.optimizer.args.eps=-1 system.optimizer.params.geometry.means.lr=.nan
system.optimizer.params.geometry.means.lr=.inf system.optimizer.params.geometry.means.lr=fast
system.optimizer.params.guidance.betas=[0.9,-0.1]
system.lr_schedule.geometry.means=[0,1e-3,-1e-3,9] system.lr_schedule.geometry.means=[0,1,0,9]
system.exporter.mesh_resolution=1 system.exporter.mesh_threshold=.nan
trainer.max_steps=.inf trainer.max_steps=-2 trainer.max_steps=1e12 trainer.max_steps=many
trainer.accumulate_grad_batches=1e12 trainer.accumulate_grad_batches=0
trainer.val_check_interval=0 trainer.val_check_interval=-1 trainer.val_check_interval=1.5
trainer.check_val_every_n_epoch=0 trainer.log_every_n_steps=-1 trainer.limit_train_batches=0
trainer.accelerator=gpux trainer.precision=17 trainer.devices=0 trainer.devices=-3
trainer.num_nodes=0 trainer.gradient_clip_val=-1 trainer.max_epochs=.nan trainer.max_time=soon
trainer.enable_progress_bar=perhaps trainer.fast_dev_run=-1
checkpoint.save_top_k=-2 checkpoint.every_n_train_steps=-1 checkpoint.mode=best
""",
    NGP: """
data.width=[64,0] data.width=[64,128,256] data.resolution_milestones=[]
system.geometry.radius=0 system.geometry.radius=.nan system.geometry.density_bias=blob_magic
system.geometry.density_bias=.inf system.geometry.density_blob_std=0
system.geometry.isosurface_resolution=1 system.geometry.isosurface_resolution=1e6
system.geometry.isosurface_threshold=autos system.geometry.isosurface_chunk=-1
system.geometry.pos_encoding_config.n_levels=0 system.geometry.pos_encoding_config.n_levels=.nan
system.geometry.pos_encoding_config.log2_hashmap_size=40 system.geometry.normal_type=up
system.geometry.pos_encoding_config.n_features_per_level=3
system.geometry.pos_encoding_config.per_level_scale=.inf system.geometry.n_feature_dims=-1
system.geometry.mlp_network_config.n_neurons=0 system.geometry.finite_difference_normal_eps=0
system.renderer.num_samples_per_ray=0 system.renderer.num_samples_per_ray=1e9
system.renderer.near_plane=-0.1 system.renderer.far_plane=0 system.renderer.estimator=proposal
system.renderer.eval_chunk_size=-1 system.background.random_aug_prob=-0.5
system.background.eval_color=[1,2,3] system.exporter.texture_size=0 system.exporter.fmt=obj-mlt
system.stage=fine system.optimizer.params.background.lr=-1
""",
}
ACCEPTED = {
    GS: """
seed=0 data.width=32 data.width=1e2 data.batch_size=1 data.fovy_range=[50,50] data.n_test_views=1
data.elevation_range=[-90,90] data.azimuth_range=[0,360] data.camera_perturb=0
data.progressive_until=1000 system.renderer.far_plane=1e10 system.renderer.eps2d=0.01
system.geometry.ball.n_points=1e5 system.geometry.sh_degree=3 system.sheet_views=0
system.guidance.guidance_scale=.inf system.guidance.guidance_scale=1e6
system.guidance.grad_clip=[0,2.0,0.5,1000] system.guidance.grad_clip=null
system.guidance.max_step_percent=[0,0.98,0.3,300] system.guidance.max_step_percent=[0.98,0.5,300]
system.guidance.max_step_percent=[5000,0.98,0.5,5001] system.guidance.min_step_percent=0
system.guidance.max_step_percent=[0,0.9,0.8,10,0.5,20] system.guidance.inversion_scale=-7.5
system.loss.lambda_sds=0 system.loss.lambda_opaque=[0,0.0,1.0,100] system.loss.lambda_sparsity=-1
system.optimizer.args.lr=0 system.optimizer.params.geometry.means.betas=[0,0.99]
system.lr_schedule={} system.radius=4 trainer.max_steps=0 trainer.max_steps=1e4
trainer.val_check_interval=0.5 trainer.val_check_interval=1.0 trainer.limit_val_batches=0
trainer.limit_test_batches=0 trainer.log_every_n_steps=0 trainer.num_sanity_val_steps=-1
trainer.precision=bf16-mixed trainer.precision=16 trainer.devices=-1 trainer.devices=auto
trainer.accelerator=auto trainer.gradient_clip_val=0.5 trainer.max_time="00:12:00:00"
trainer.fast_dev_run=2 trainer.accumulate_grad_batches=8 checkpoint.save_top_k=-1
checkpoint.every_n_train_steps=0 system.strategy.default.cap_max=0 system.strategy.name=mcmc
system.weights_ignore_modules=[guidance] system.background.learned=true
""",
    NGP: """
data.batch_size=4 system.geometry.isosurface_threshold=auto
system.geometry.isosurface_threshold=10 system.geometry.density_bias=0 system.exporter.fmt=glb
system.geometry.normal_type=null system.renderer.near_plane=0 system.background.eval_color=[0,0,1]
system.loss.lambda_orient=[0,10.,1000.,5000] system.renderer.estimator=importance
system.scheduler.args.gamma=0.1
system.optimizer.args.momentum=0.9
system.geometry.pos_encoding_config.n_levels=8
""",
}


@pytest.fixture(scope="module")
def configs(lods):
    prompt = ["system.prompt_processor.prompt=x"]
    return {name: load_config(CONFIG.format(name), cli_args=prompt) for name in (GS, NGP)}


def check(cfg, override):
    """The section of an override, as check_parts has it checked, and no other, for speed."""
    more = parse_overrides([override], cfg)
    [top] = more
    [part] = more[top] if top == "system" else [None]
    kind = cfg.system.get(f"{part}_type")
    if top in ("data", "system"):
        name, keys = (kind, [top, part]) if kind else (cfg[f"{top}_type"], [top])
        sections = [OmegaConf.select(c, ".".join(keys)) or {} for c in (cfg, more)]
        fields = threestudio.find(name).Config
        parse_structured(fields, OmegaConf.merge(*sections), prefix=".".join(keys))
    else:
        values = {key: cfg[key] for key in ("seed", "trainer", "checkpoint")}
        parse_structured(ExperimentConfig, OmegaConf.merge(values, more, {"tag": "t"}))


def cases(table):
    return [(name, case.split(":data.")[0]) for name in table for case in table[name].split()]


def test_what_makes_no_sense_is_refused_with_its_full_key_and_value(configs):
    wrongly = []
    for name, override in cases(REFUSED):
        key = override.partition("=")[0]
        try:
            check(configs[name], override)
        except UserError as error:
            message = str(error)
            said = key in message or message.startswith("data.height needs the same length")
            if not said or "\n" in message:
                wrongly.append((override, message))
        else:
            wrongly.append((override, "accepted"))
    assert len(cases(REFUSED)) > 190
    assert not wrongly, wrongly


def test_what_a_sensible_user_sets_is_not(configs):
    refused = []
    for name, override in cases(ACCEPTED):
        try:
            check(configs[name], override)
        except UserError as error:
            refused.append((override, str(error)))
    assert not refused, refused


# --- a whole config ---


@pytest.mark.parametrize(
    "override",
    [
        "data.fovy_range=[0,0]",
        "system.renderer.near_plane=-1",
        "system.renderer.far_plane=.nan",
        "system.geometry.ball.n_points=0",
        "system.strategy.mcmc.cap_max=0",
        "system.optimizer.params.geometry.means.lr=.inf",
        "trainer.max_steps=.inf",
        "system.material.of_whoever=.nan",
    ],
)
def test_a_whole_config_is_refused_before_anything_is_built(lods, override):
    overrides = ["system.prompt_processor.prompt=x", override]
    with pytest.raises(UserError, match="^" + re.escape(override.partition("=")[0])):
        check_parts(load_config(CONFIG.format(GS), cli_args=overrides), "train")


def test_a_renderer_that_cannot_draw_the_geometry_is_refused(configs):
    for name, renderer in ((GS, "nerf-volume-renderer"), (NGP, "lods-gaussian-rasterizer")):
        cfg = OmegaConf.merge(configs[name], {"system": {"renderer_type": renderer}})
        with pytest.raises(UserError, match=f"renderer_type={renderer} does not go with"):
            check_parts(cfg, "train")
    cfg = OmegaConf.merge(configs[GS], {"system": {"exporter_type": "mesh-exporter"}})
    with pytest.raises(UserError, match=r"has no isosurface\(\)"):
        check_parts(cfg, "export")


def test_a_training_without_an_end_is_refused(configs):
    cfg = OmegaConf.merge(configs[GS], {"trainer": {"max_steps": -1}})
    with pytest.raises(UserError, match=r"set trainer\.max_steps"):
        check_parts(cfg, "train")
    check_parts(cfg, "test")
    for limit in ({"max_time": "00:01:00:00"}, {"limit_train_batches": 5}, {"fast_dev_run": True}):
        check_parts(OmegaConf.merge(cfg, {"trainer": limit}), "train")


@pytest.mark.parametrize("part", ["background", "guidance", "prompt_processor", "exporter"])
def test_a_class_that_is_not_registered_is_refused_where_the_system_builds_it(configs, part):
    cfg = OmegaConf.merge(configs[GS], {"system": {f"{part}_type": "of-nobody"}})
    with pytest.raises(KeyError, match="of-nobody"):
        check_parts(cfg, "train")


def test_a_class_that_is_not_registered_is_left_to_a_system_that_may_never_build_it(
    configs, monkeypatch
):
    import threestudio

    cfg = OmegaConf.merge(configs[GS], {"system": {"guidance_type": "of-nobody"}})
    monkeypatch.setattr(threestudio.find(cfg.system_type), "builds_too", ())
    check_parts(cfg, "train")


@pytest.mark.parametrize("name", sorted(p.name for p in ORIGINAL.glob("*.yaml")))
def test_the_originals_configurations_are_not_refused(lods, name):
    overrides = ["system.prompt_processor.prompt=x"]
    check_parts(load_config(str(ORIGINAL / name), cli_args=overrides), "train")
