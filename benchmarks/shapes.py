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
