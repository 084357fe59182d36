"""Public names of threestudio 0.2.x, as upstream has them; not made from this repository's code.

A signature is the parameter list: names in order, and defaults where they matter. None: callable.
"""

FUNCTIONS = {
    "threestudio": {
        "register": "name",
        "find": "name",
        "debug": None,
        "info": None,
        "warn": "*args, **kwargs",
        "rank_zero_only": None,
    },
    "threestudio.utils.config": {
        "load_config": "*yamls, cli_args=[], from_string=False, **kwargs",
        "config_to_primitive": "config, resolve=True",
        "dump_config": "path, config",
        "parse_structured": "fields, cfg=None",
        "C_max": "value",
    },
    "threestudio.utils.misc": {
        "parse_version": "ver",
        "get_rank": "",
        "get_device": "",
        "load_module_weights": "path, module_name=None, ignore_modules=None, map_location=None",
        "C": "value, epoch, global_step, interpolation='linear'",
        "cleanup": "",
        "finish_with_cleanup": "func",
        "barrier": "",
        "broadcast": "tensor, src=0",
        "enable_gradient": "model, enabled=True",
        "find_last_path": "path",
    },
    "threestudio.utils.base": {
        "update_if_possible": "module, epoch, global_step",
        "update_end_if_possible": "module, epoch, global_step",
    },
    "threestudio.utils.loss": {"tv_loss": "x"},
    "threestudio.utils.ops": {
        "dot": "x, y",
        "reflect": "x, n",
        "scale_tensor": "dat, inp_scale, tgt_scale",
        "get_activation": "name",
        "trunc_exp": None,
        "chunk_batch": "func, chunk_size, *args, **kwargs",
        "get_ray_directions": "H, W, focal, principal=None, use_pixel_centers=True",
        "get_rays": "directions, c2w, keepdim=False, noise_scale=0.0, normalize=True",
        "get_projection_matrix": "fovy, aspect_wh, near, far",
        "get_mvp_matrix": "c2w, proj_mtx",
        "get_full_projection_matrix": "c2w, proj_mtx",
        "convert_pose": "C2W",
        "get_projection_matrix_gaussian": "znear, zfar, fovX, fovY",
        "get_fov_gaussian": "P",
        "get_cam_info_gaussian": "c2w, fovx, fovy, znear, zfar",
        "binary_cross_entropy": "input, target",
        "tet_sdf_diff": "vert_sdf, tet_edges",
        "ce_pq_loss": "p, q, weight=None",
        "shifted_expotional_decay": "a, b, c, r",
        "shifted_cosine_decay": "a, b, c, r",
        "perpendicular_component": "x, y",
        "validate_empty_rays": "ray_indices, t_start, t_end",
    },
    "threestudio.systems.utils": {
        "get_parameters": "model, name",
        "parse_optimizer": "config, model",
        "parse_scheduler": "config, optimizer",
        "parse_scheduler_to_instance": "config, optimizer",
    },
    "threestudio.models.geometry.base": {
        "contract_to_unisphere": "x, bbox, unbounded=False",
    },
    "threestudio.models.networks": {
        "get_encoding": "n_input_dims, config",
        "get_mlp": "n_input_dims, n_output_dims, config",
        "create_network_with_input_encoding": (
            "n_input_dims, n_output_dims, encoding_config, network_config"
        ),
    },
    "threestudio.models.prompt_processors.base": {
        "hash_prompt": "model, prompt",
        "shift_azimuth_deg": "azimuth",
    },
}

CFG, SCENE = "cfg=None, *args, **kwargs", "geometry, material, background"
UPDATE = "self, epoch, global_step, on_load_weights=False"
UPDATES = {
    "do_update_step": UPDATE,
    "update_step": UPDATE,
    "do_update_step_end": "self, epoch, global_step",
    "update_step_end": "self, epoch, global_step",
}
CLASSES = {  # "module:class" -> signature of the constructor, of the methods
    "threestudio.utils.base:Configurable": ("cfg=None", {}),
    "threestudio.utils.base:Updateable": ("", UPDATES),
    "threestudio.utils.base:BaseObject": (CFG, {**UPDATES, "configure": "self, *args, **kwargs"}),
    "threestudio.utils.base:BaseModule": (CFG, {**UPDATES, "configure": "self, *args, **kwargs"}),
    "threestudio.utils.config:ExperimentConfig": ("name='default', description='', tag=''", {}),
    "threestudio.systems.base:BaseSystem": (
        "cfg, resumed=False",
        {
            **UPDATES,
            "load_weights": "self, weights, ignore_modules=None",
            "set_resume_status": "self, current_epoch, global_step",
            "configure": "self",
            "post_configure": "self",
            "C": "self, value",
            "configure_optimizers": "self",
            "training_step": "self, batch, batch_idx",
            "validation_step": "self, batch, batch_idx",
            "test_step": "self, batch, batch_idx",
            "predict_step": "self, batch, batch_idx",
            "preprocess_data": "self, batch, stage",
            "on_train_batch_start": "self, batch, batch_idx, unused=0",
            "on_validation_batch_start": "self, batch, batch_idx, dataloader_idx=0",
            "on_test_batch_start": "self, batch, batch_idx, dataloader_idx=0",
            "on_predict_batch_start": "self, batch, batch_idx, dataloader_idx=0",
            "on_train_batch_end": "self, outputs, batch, batch_idx",
            "on_validation_batch_end": "self, outputs, batch, batch_idx, dataloader_idx=0",
            "on_test_batch_end": "self, outputs, batch, batch_idx, dataloader_idx=0",
            "on_predict_batch_end": "self, outputs, batch, batch_idx, dataloader_idx=0",
            "on_validation_epoch_end": "self",
            "on_before_optimizer_step": "self, optimizer",
            "on_load_checkpoint": "self, checkpoint",
            "optimizers": "self",
            "lr_schedulers": "self",
            "manual_backward": "self, loss",
            "log": "self, name, value",
        },
    ),
    "threestudio.systems.base:BaseLift3DSystem": (
        "cfg, resumed=False",
        {
            "on_fit_start": "self",
            "on_test_end": "self",
            "on_predict_start": "self",
            "on_predict_epoch_end": "self",
            "on_predict_end": "self",
            "guidance_evaluation_save": "self, comp_rgb, guidance_eval_out",
        },
    ),
    "threestudio.utils.saving:SaverMixin": (
        "",
        {
            "set_save_dir": "self, save_dir",
            "get_save_dir": "self",
            "get_save_path": "self, filename",
            "convert_data": "self, data",
            "create_loggers": "self, cfg_loggers",
            "get_loggers": "self",
            "save_rgb_image": (
                "self, filename, img, data_format='HWC', data_range=(0, 1), name=None, step=None"
            ),
            "save_uv_image": (
                "self, filename, img, data_format='HWC', data_range=(0, 1), cmap='checkerboard'"
            ),
            "save_grayscale_image": (
                "self, filename, img, data_range=None, cmap='jet', name=None, step=None"
            ),
            "save_image_grid": (
                "self, filename, imgs, align='max', name=None, step=None, texts=None"
            ),
            "save_image": "self, filename, img",
            "save_cubemap": "self, filename, img, data_range=(0, 1), rgba=False",
            "save_data": "self, filename, data",
            "save_state_dict": "self, filename, data",
            "save_img_sequence": (
                "self, filename, img_dir, matcher, save_format='mp4', fps=30, name=None, step=None"
            ),
            "save_mesh": "self, filename, v_pos, t_pos_idx, v_tex=None, t_tex_idx=None",
            "save_obj": (
                "self, filename, mesh, save_mat, save_normal, save_uv, save_vertex_color, "
                "map_Kd, map_Ks, map_Bump, map_Pm, map_Pr, map_format='jpg'"
            ),
            "save_file": "self, filename, src",
            "save_json": "self, filename, payload",
        },
    ),
    "threestudio.utils.callbacks:CodeSnapshotCallback": (
        "save_root, version=None, use_version=True",
        {},
    ),
    "threestudio.utils.callbacks:ConfigSnapshotCallback": (
        "config_path, cfg, save_root, version=None, use_version=True",
        {},
    ),
    "threestudio.utils.callbacks:CustomProgressBar": ("refresh_rate", {}),
    "threestudio.utils.callbacks:ProgressCallback": ("save_path", {}),
    "threestudio.utils.rasterize:NVDiffRasterizerContext": (
        "context_type, device",
        {
            "vertex_transform": "self, verts, mvp_mtx",
            "rasterize": "self, pos, tri, resolution",
            "rasterize_one": "self, pos, tri, resolution",
            "antialias": "self, color, rast, pos, tri",
            "interpolate": "self, attr, rast, tri, rast_db=None, diff_attrs=None",
            "interpolate_one": "self, attr, rast, tri, rast_db=None, diff_attrs=None",
        },
    ),
    "threestudio.data.uncond:RandomCameraIterableDataset": ("cfg", {"collate": "self, batch"}),
    "threestudio.data.uncond:RandomCameraDataset": ("cfg, split", {"collate": "self, batch"}),
    "threestudio.data.uncond:RandomCameraDataModule": (
        "cfg=None",
        {
            "setup": "self, stage=None",
            "train_dataloader": "self",
            "val_dataloader": "self",
            "test_dataloader": "self",
            "predict_dataloader": "self",
            "general_loader": "self, dataset, batch_size, collate_fn=None",
        },
    ),
    "threestudio.models.geometry.base:BaseGeometry": (
        CFG,
        {"create_from": "other, cfg=None, **kwargs", "export": "self, *args, **kwargs"},
    ),
    "threestudio.models.geometry.base:BaseExplicitGeometry": (CFG, {}),
    "threestudio.models.geometry.base:BaseImplicitGeometry": (
        CFG,
        {
            "forward": "self, points, output_normal=False",
            "forward_field": "self, points",
            "forward_level": "self, field, threshold",
            "isosurface": "self",
        },
    ),
    "threestudio.models.materials.base:BaseMaterial": (
        CFG,
        {"forward": "self, *args, **kwargs", "export": "self, *args, **kwargs"},
    ),
    "threestudio.models.background.base:BaseBackground": (CFG, {"forward": "self, dirs"}),
    "threestudio.models.renderers.base:Renderer": (
        CFG,
        {
            "configure": f"self, {SCENE}",
            "forward": "self, *args, **kwargs",
            "set_geometry": "self, geometry",
            "set_material": "self, material",
            "set_background": "self, background",
        },
    ),
    "threestudio.models.renderers.base:VolumeRenderer": (CFG, {"configure": f"self, {SCENE}"}),
    "threestudio.models.renderers.base:Rasterizer": (CFG, {"configure": f"self, {SCENE}"}),
    "threestudio.models.mesh:Mesh": (
        "v_pos, t_pos_idx, **kwargs",
        {
            "add_extra": "self, name, value",
            "remove_outlier": "self, outlier_n_faces_threshold",
            "set_vertex_color": "self, v_rgb",
            "unwrap_uv": "self, xatlas_chart_options={}, xatlas_pack_options={}",
            "normal_consistency": "self",
            "laplacian": "self",
        },
    ),
    "threestudio.models.exporters.base:ExporterOutput": ("save_name, save_type, params", {}),
    "threestudio.models.exporters.base:Exporter": (
        CFG,
        {"configure": f"self, {SCENE}", "__call__": "self, *args, **kwargs"},
    ),
    "threestudio.models.networks:TCNNEncoding": ("in_channels, config", {}),
    "threestudio.models.networks:TCNNEncodingSpatialTime": (
        "in_channels, config",
        {
            "set_temp_param_grad": "self, requires_grad=False",
            "set_param_grad": "self, param_list, requires_grad=False",
        },
    ),
    "threestudio.models.estimators:ImportanceEstimator": (
        "",
        {
            "sampling": (
                "self, prop_sigma_fns, prop_samples, num_samples, n_rays, near_plane, far_plane, "
                "sampling_type='uniform', stratified=False, requires_grad=False"
            )
        },
    ),
    "threestudio.utils.perceptual:PerceptualLoss": (
        "use_dropout=True",
        {"forward": "self, input, target"},
    ),
    "threestudio.utils.ops:ShapeLoss": ("guide_shape", {"forward": "self, xyzs, sigmas"}),
    "threestudio.utils.ops:MeshOBJ": (
        "v, f",
        {
            "normalize_mesh": "self, target_scale=0.5",
            "winding_number": "self, query",
            "gaussian_weighted_distance": "self, query, sigma",
        },
    ),
    "threestudio.data.image:SingleImageIterableDataset": (
        "cfg, split",
        {"collate": "self, batch", "get_all_images": "self"},
    ),
    "threestudio.data.image:SingleImageDataset": ("cfg, split", {"get_all_images": "self"}),
    "threestudio.data.image:SingleImageDataModule": ("cfg=None", {"setup": "self, stage=None"}),
    "threestudio.systems.dreamfusion:DreamFusion": ("cfg, resumed=False", {}),
    "threestudio.systems.prolificdreamer:ProlificDreamer": ("cfg, resumed=False", {}),
    "threestudio.systems.latentnerf:LatentNeRF": ("cfg, resumed=False", {}),
    "threestudio.models.networks:TCNNNetwork": ("dim_in, dim_out, config", {}),
    "threestudio.models.networks:VanillaMLP": ("dim_in, dim_out, config", {}),
    "threestudio.models.networks:SphereInitVanillaMLP": ("dim_in, dim_out, config", {}),
    "threestudio.models.networks:CompositeEncoding": ("encoding, include_xyz=False", {}),
    "threestudio.models.networks:NetworkWithInputEncoding": ("encoding, network", {}),
    "threestudio.models.networks:ToDTypeWrapper": ("module, dtype", {}),
    "threestudio.models.prompt_processors.base:PromptProcessor": (CFG, {"__call__": "self"}),
    "threestudio.models.prompt_processors.base:PromptProcessorOutput": (
        "text_embeddings, uncond_text_embeddings, text_embeddings_vd, uncond_text_embeddings_vd, "
        "directions, direction2idx, use_perp_neg, perp_neg_f_sb, perp_neg_f_fsb, perp_neg_f_fs, "
        "perp_neg_f_sf",
        {
            name: "self, elevation, azimuth, camera_distances, view_dependent_prompting=True"
            for name in ("get_text_embeddings", "get_text_embeddings_perp_neg")
        },
    ),
    "threestudio.models.prompt_processors.base:DirectionConfig": (
        "name, prompt, negative_prompt, condition",
        {},
    ),
}
PROPERTIES = {
    "threestudio.systems.base:BaseSystem": "resumed true_global_step true_current_epoch",
    "threestudio.models.renderers.base:Renderer": "geometry material background",
    "threestudio.models.exporters.base:Exporter": "geometry material background",
    "threestudio.models.mesh:Mesh": "requires_grad v_nrm v_tng v_tex t_tex_idx v_rgb edges",
}
TYPING = (
    "Any Bool Callable Complex Dict DictConfig Float Inexact Int Integer Iterable List Literal "
    "NamedTuple NewType Num Optional Shaped Sized Tensor Tuple Type TypeVar UInt Union typechecker"
)
RESOLVERS = (
    "calc_exp_lr_decay_rate add sub mul div idiv basename rmspace tuple2 gt0 not cmaxgt0 "
    "cmaxgt0orcmaxgt0"
)
REGISTERED = (  # what configurations of extensions ask the host for
    "random-camera-datamodule stable-diffusion-prompt-processor dummy-prompt-processor "
    "stable-diffusion-guidance no-material diffuse-with-point-light-material "
    "solid-color-background neural-environment-map-background textured-background "
    "implicit-volume volume-grid nerf-volume-renderer mesh-exporter dummy-exporter "
    "single-image-datamodule dreamfusion-system prolificdreamer-system latentnerf-system "
    "stable-diffusion-vsd-guidance perceptual-loss"
)
# Left out on purpose: docs/upstream.md has all of them. Image to 3D with Zero-1-to-3, and what only
# the 'eff' data module needs.
LEFT_OUT = ["stable-zero123-guidance", "zero123-system", "efficient-dreamfusion-system"]
LEFT_OUT_OF_OPS = ["mask_ray_directions"]
# All 55 names that `import threestudio` of upstream registers.
UPSTREAM_REGISTERED = (
    "random-camera-datamodule eff-random-camera-datamodule single-image-datamodule "
    "multiview-camera-datamodule co3d-datamodule "
    "implicit-volume implicit-sdf volume-grid tetrahedra-sdf-grid custom-mesh "
    "no-material diffuse-with-point-light-material hybrid-rgb-latent-material "
    "neural-radiance-material pbr-material sd-latent-adapter-material "
    "solid-color-background neural-environment-map-background textured-background "
    "nerf-volume-renderer neus-volume-renderer gan-volume-renderer patch-renderer "
    "nvdiff-rasterizer "
    "stable-diffusion-guidance stable-diffusion-vsd-guidance stable-diffusion-sdi-guidance "
    "stable-diffusion-unified-guidance stable-diffusion-controlnet-guidance "
    "stable-diffusion-instructpix2pix-guidance deep-floyd-guidance zero123-guidance "
    "stable-zero123-guidance zero123-unified-guidance "
    "stable-diffusion-prompt-processor deep-floyd-prompt-processor dummy-prompt-processor "
    "mesh-exporter dummy-exporter "
    "dreamfusion-system efficient-dreamfusion-system prolificdreamer-system magic3d-system "
    "magic123-system fantasia3d-system latentnerf-system sjc-system sdi-system textmesh-system "
    "instructnerf2nerf-system control4d-multiview-system image-condition-dreamfusion-system "
    "zero123-system zero123-simple-system "
    "perceptual-loss"
)
