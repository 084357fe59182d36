"""What viewers of Gaussians are sent."""

import math

import torch
from lods.gaussians import Gaussians


def test_splats_are_the_gaussians_in_plain_units():
    quarter = math.sqrt(0.5)  # a quarter turn about z: the long axis goes from x to y
    tensors = {
        "means": torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        "scales": torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]]).log(),
        "quats": torch.tensor([[2 * quarter, 0.0, 0.0, 2 * quarter], [1.0, 0.0, 0.0, 0.0]]),
        "opacities": torch.tensor([0.0, 5.0]),
        "sh0": torch.tensor([[[9.0, 0.0, -9.0]], [[0.0, 0.0, 0.0]]]),
    }
    found = Gaussians(tensors).splats()
    assert torch.equal(found["centers"], tensors["means"])
    assert torch.allclose(
        found["covariances"][0], torch.diag(torch.tensor([4.0, 9.0, 1.0])), atol=1e-5
    )
    assert torch.equal(found["rgbs"][0], torch.tensor([1.0, 0.5, 0.0]))
    assert torch.allclose(found["opacities"], tensors["opacities"].sigmoid()[:, None])
    few = Gaussians(tensors).splats(1)
    assert torch.equal(few["centers"], tensors["means"][:1])  # 0.5 * 6 against 1 * 1
    assert not any(value.requires_grad for value in found.values())
