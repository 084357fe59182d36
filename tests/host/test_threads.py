"""Threads of compiled kernels and of torch, which share OpenMP's number of them."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

RUN = {
    "host": "from threestudio.utils.parallel import run_kernel as run",
    "extension": "import sys; sys.path.insert(0, 'custom/threestudio-lods'); "
    "from lods.gaussians.backends.simd import run",
}
CODE = """
import numba, torch
seen = run(lambda: (numba.get_num_threads(), torch.get_num_threads()), 2)
torch.set_num_threads(3)
later = run(torch.get_num_threads, 1)
print(*seen, later, torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.parametrize("package", RUN)
def test_kernels_leave_torch_its_threads(package):
    """numba starts its threads with the first kernel and tells OpenMP how many; torch must not
    take over their number, or two runs of one thread each fight for the cores."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "4"}
    command = [sys.executable, "-c", RUN[package] + "\n" + CODE]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split()[-5:] == ["2", "1", "3", "3", "4"], done.stderr
