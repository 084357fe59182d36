"""How compiled (numba) kernels share the cores with torch. Importing this imports numba."""

import threading

import numba
import torch

from threestudio.utils.typing import *

# numba's fallback threading layer ('workqueue') does not survive concurrent calls, of any kernels
_LOCK = threading.Lock()


def worker_count(work: int, serial_work: int) -> int:
    """Threads to use: torch's number (``torch.set_num_threads``), or one for less than
    ``serial_work``, where starting threads costs more than it saves."""
    most = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    return 1 if work < serial_work else max(1, most)


def run_kernel(kernel: Callable, workers: int, *args) -> Any:
    """``kernel(*args)`` with that many threads; numba's and torch's settings are left as they
    were."""
    with _LOCK:
        threads = torch.get_num_threads()
        before = numba.get_num_threads()  # the first time, starts them and tells OpenMP so, ...
        if torch.get_num_threads() != threads:  # ... which torch shares
            torch.set_num_threads(threads)
        numba.set_num_threads(workers)
        try:
            return kernel(*args)
        finally:
            numba.set_num_threads(before)
