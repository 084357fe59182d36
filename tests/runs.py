"""Runs of seconds, through the command line or the trainer, for the tests of the systems."""

import importlib
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

ROOT = Path(__file__).resolve().parent.parent


def small_run(model):
    """Overrides that make a shipped configuration a run of seconds with the folder ``model``."""
    return [
        "system.prompt_processor.prompt=a red car",
        f"system.prompt_processor.pretrained_model_name_or_path={model}",
        "data.batch_size=2",
        "data.width=16",
        "data.height=16",
        "data.eval_width=24",
        "data.eval_height=24",
        "data.n_test_views=5",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.enable_progress_bar=false",
        "trainer.precision=32",
        "use_timestamp=false",
        "tag=t",
    ]


# overrides that make a radiance field of a shipped configuration one of milliseconds
SMALL_FIELD = [
    "data.resolution_milestones=[]",
    "system.geometry.pos_encoding_config.n_levels=2",
    "system.geometry.pos_encoding_config.log2_hashmap_size=8",
    "system.geometry.pos_encoding_config.base_resolution=4",
    "system.geometry.isosurface_method=mc-cpu",
    "system.geometry.isosurface_resolution=16",
    "system.geometry.isosurface_threshold=3",
    "system.renderer.num_samples_per_ray=16",
]
# for a trainer that takes steps and does nothing else
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}

LEARNING = ("embedding", "lora", "vsd", "inner", "perp-neg")  # priors, for ``switch``, that learn


def switch(prior):
    """Overrides that put ``prior`` in the place of that of a shipped configuration, with both of
    its stages in the first four steps; "inner" and "perp-neg" are switches of the one there."""
    if prior in ("embedding", "lora"):
        return []
    if prior == "inner":
        return ["system.guidance.prior_inner_steps=2"]
    if prior == "perp-neg":
        return ["system.prompt_processor.use_perp_neg=true"]
    return [f"system.guidance_type=lods-{prior}-guidance", "system.guidance.bridge_start=1"]


def launch(files, overrides, mode="--train", *options):
    """``launch.py`` in this process; returns its exit status."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("launch").main(
            [*options, "--config", *files, mode, *overrides]
        )
    finally:
        sys.path.remove(str(ROOT))


def fit(files, overrides, resume=None, callbacks=(), max_steps=2):
    """A fresh system trained by a fresh trainer, without the files of a launched run."""
    import threestudio
    from threestudio.utils.config import load_config

    cfg = load_config(*files, cli_args=overrides)
    pl.seed_everything(cfg.seed)
    data = threestudio.find(cfg.data_type)(cfg.data)
    system = threestudio.find(cfg.system_type)(cfg.system, resumed=resume is not None)
    system.set_save_dir("save")
    trainer = pl.Trainer(
        max_steps=max_steps,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        inference_mode=False,
        **QUIET,
        callbacks=list(callbacks),
    )
    trainer.fit(system, datamodule=data, ckpt_path=resume)
    return system, trainer


def same(a, b, where=""):
    """Assert that two checkpoints' contents are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def two_and_two(run, keys):
    """Train ``run`` for four steps, and again from its checkpoint of step 2 (written by a callback
    inside of the loop); assert that the checkpoints of step 4 are equal under ``keys``, and return
    those of step 2 and 4."""

    def saver(folder):
        return pl.callbacks.ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=2, save_top_k=-1
        )

    torch.manual_seed(0)
    fit(*run, callbacks=[saver("whole")], max_steps=4)
    torch.manual_seed(99)  # whatever happened in the process before
    torch.rand(7)
    fit(*run, resume="whole/step=2.ckpt", callbacks=[saver("resumed")], max_steps=4)
    start, whole, resumed = (
        read(p) for p in ("whole/step=2.ckpt", "whole/step=4.ckpt", "resumed/step=4.ckpt")
    )
    for key in keys:
        same(whole[key], resumed[key], key)
    return start, whole
