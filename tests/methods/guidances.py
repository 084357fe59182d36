"""The methods as guidances on a tiny random model, for the tests beside this file."""

import pytest
import torch

from threestudio import find

EMBEDDING, LORA, SDS = PLAIN = [
    "lods-embedding-guidance",
    "lods-lora-guidance",
    "lods-sds-guidance",
]
VSD = "lods-vsd-guidance"
LEARNING = [EMBEDDING, LORA, VSD]
ALL = [*PLAIN, VSD, *(f"lods-{name}-guidance" for name in ("csd", "nfsd", "bridge", "sdi", "ism"))]
DRAWN = ALL[:-2]  # those whose noise is drawn, not found by inversion


@pytest.fixture(scope="module")
def make(lods, tiny_sd):
    """``make(name, prediction_type="epsilon", **fields)``: a guidance with latents (4, 8, 8)."""

    def build(name, prediction_type="epsilon", **fields):
        fields.setdefault("pretrained_model_name_or_path", tiny_sd(prediction_type=prediction_type))
        if "bridge" in name:
            fields.setdefault("bridge_start", 0)  # its own gradient from the first step on
        return find(name)(fields)

    return build


def images(n=2, size=16, channels=3, seed=1):
    return torch.rand(n, size, size, channels, generator=torch.Generator().manual_seed(seed))


def total(out):
    return sum(v for k, v in out.items() if k.startswith("loss_"))
