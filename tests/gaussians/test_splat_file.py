"""The .splat format: 32 bytes a Gaussian."""

import struct

import pytest
import torch
from lods.gaussians.ply import write_ply, write_points
from lods.gaussians.splat_file import convert, main


def test_a_row_is_what_the_format_says_and_what_matters_most_comes_first(tmp_path):
    small, big = [-4.0, -4.0, -4.0], [-1.0, -2.0, -3.0]
    means = torch.tensor([[1.0, 2.0, 3.0], [-0.5, 0.25, 8.0]])
    half = 0.5 / 0.28209479177387814  # the harmonic of white
    write_ply(
        tmp_path / "a.ply",
        means=means,
        scales=torch.tensor([small, big]),
        quats=torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 2.0, 0]]),  # the second is not normalised
        opacities=torch.tensor([0.0, 9.0]),
        sh0=torch.tensor([[[0.0, 0.0, 0.0]], [[half, -half, 9.0]]]),
    )
    assert convert(tmp_path / "a.ply", tmp_path / "a.splat") == 2
    data = (tmp_path / "a.splat").read_bytes()
    assert len(data) == 64
    first, second = struct.unpack("<6f4B4B", data[:32]), struct.unpack("<6f4B4B", data[32:])
    assert first[:3] == (-0.5, 0.25, 8.0)
    assert first[3:6] == pytest.approx(torch.tensor(big).exp().tolist())
    assert first[6:] == (255, 0, 255, 255, 128, 128, 255, 128)
    assert second[:3] == (1.0, 2.0, 3.0)
    assert second[6:] == (128, 128, 128, 128, 255, 128, 128, 128)


def test_a_file_without_gaussians_is_refused_in_one_line(tmp_path, capsys):
    write_points(tmp_path / "p.ply", torch.zeros(2, 3), torch.zeros(2, 3))
    for source in ("p.ply", "missing.ply"):
        assert main([str(tmp_path / source), str(tmp_path / "p.splat")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "p.splat").exists()
