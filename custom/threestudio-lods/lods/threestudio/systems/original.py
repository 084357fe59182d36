"""What the original's Gaussian YAML leaves to its code.

That YAML has no geometry, densification or renderer: all of it is constants in the code. Here they
are values, filled in only where the YAML has none. Two things that it does say the original does
not heed, and here they hold: its ``optimizer`` (betas 0.9 and 0.99 for all, where the original has
0.9 and 0.999 for the Gaussians), and ``max_step_percent`` after step 500, where the original forces
0.55. ``configs/lods-gs-*.yaml`` have what the original does.
"""

from omegaconf import OmegaConf

import threestudio

SHAP_E_SCALE = 0.4  # the initial shape's half extent is this part of ``system.radius``

CONSTANTS = {
    "geometry": {
        "sh_degree": 0,
        "init_type": "shap-e",
        "init_opacity": 0.1,
        "shap_e": {
            "guidance_scale": 15.0,
            "num_steps": 64,
            "vertex_stride": 4,
            "growth_points": 1000000,
            "growth_distance": 0.01,
            "color_noise": 0.2,
        },
    },
    "strategy": {
        "name": "default",
        "scene_scale": 3.5,
        "default": {
            "grow_grad2d": 0.0002,
            "grow_scale3d": 0.003,
            "grow_scale2d": 1.0,
            "prune_opa": 0.005,
            "prune_scale3d": 0.1,
            "prune_scale2d": 0.039,
            "refine_scale2d_stop_iter": 1000,
            "refine_start_iter": 300,
            "refine_stop_iter": 1000,
            "refine_every": 100,
            "reset_every": 0,
        },
    },
    "background": {"color": [0.0, 0.0, 0.0]},
    "renderer": {"near_plane": 0.01, "far_plane": 100.0},
}
GROUPS = {
    "geometry.means": {"lr": 1.75e-4},
    "geometry.sh0": {"lr": 0.0125},
    "geometry.opacities": {"lr": 0.01},
    "geometry.scales": {"lr": 0.005},
    "geometry.quats": {"lr": 0.001},
}
GUIDANCE_GROUP = {"lr": 1.0e-4, "betas": [0.9, 0.99]}
OPTIMIZER = {"name": "Adam", "args": {"lr": 0.0, "eps": 1.0e-15}}
LR_SCHEDULE = {"geometry.means": [0, 1.75e-4, 8.75e-5, 30000]}


def complete(cfg) -> None:
    """Fill the original's constants into the configuration of ``lods-gs-system`` (in place).

    A value of the YAML is never replaced; the optimizer's groups of the Gaussians are filled in
    only if the YAML has none of them, that of the guidance if it trains nothing of it.
    """
    for name, constants in CONSTANTS.items():
        cfg[name] = OmegaConf.merge(constants, cfg[name])
    shap_e = cfg.geometry.shap_e
    shap_e.setdefault("scale", SHAP_E_SCALE * cfg.radius)
    shap_e.setdefault("prompt", cfg.prompt_processor.get("prompt", ""))
    optimizer = OmegaConf.merge(OPTIMIZER if not cfg.optimizer else {}, cfg.optimizer)
    given = dict(optimizer.get("params") or {})
    groups = {}
    if not any(name.split(".")[0] == "geometry" for name in given):
        groups |= GROUPS
        if not cfg.lr_schedule:
            cfg.lr_schedule = LR_SCHEDULE
    if not any(name.split(".")[0] == "guidance" for name in given):
        groups["guidance"] = GUIDANCE_GROUP
    cfg.optimizer = OmegaConf.merge(optimizer, {"params": {**groups, **given}})
    threestudio.info(
        "system.radius marks the original's YAML: its constants (Shap-E, densification, learning "
        "rates of the Gaussians) stand where the YAML says nothing. Its optimizer and "
        "max_step_percent hold, which the original does not heed: configs/lods-gs-*.yaml have what "
        "it does"
    )
