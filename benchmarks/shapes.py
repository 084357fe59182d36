"""Shapes of the models that the benchmarks make with random weights."""

SD_UNET = {  # Stable Diffusion 2.1-base
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),  # in effect the number of heads
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD_VAE = {
    "sample_size": 768,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


def halved(config: dict) -> dict:
    """The same with half as many channels everywhere."""
    return config | {"block_out_channels": tuple(w // 2 for w in config["block_out_channels"])}


SD3_TRANSFORMER = {  # Stable Diffusion 3 medium: 2.0 billion weights
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD3_VAE = SD_VAE | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY_TRANSFORMER = SD3_TRANSFORMER | {  # 1.3 million weights, to see that it runs
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "pos_embed_max_size": 64,
}
TINY_VAE = SD3_VAE | {
    "latent_channels": 4,
    "block_out_channels": (16, 16, 32, 32),
    "norm_num_groups": 16,
}
