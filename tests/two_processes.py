"""``launch.py`` in two processes on the CPU (gloo), of which the second is slow: a program.

    python -m tests.two_processes <arguments of launch.py>

Each process is started by :func:`run_both`, with the environment that torchrun would give it.
"""

import faulthandler
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.strategy=ddp_find_unused_parameters_true",
)
DELAY = 0.4  # seconds, before each frame of the second process


def run_both(arguments, cwd, program="tests.two_processes", timeout=1600):
    """Run ``launch.py`` with `arguments` in two processes; ``(exit statuses, outputs)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", program, *arguments],
            cwd=cwd,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def observe() -> None:
    """From now on the second process sleeps before it renders a view, and each process prints what
    it writes: "wrote <file>" and, of a video, "frames <number>"."""
    from threestudio.data.uncond import RandomCameraDataset
    from threestudio.utils import saving

    collate, replace, write_video = RandomCameraDataset.collate, os.replace, saving._write_video

    def late(self, batch):
        time.sleep(DELAY * int(os.environ["RANK"]))
        return collate(self, batch)

    def told(source, target):
        replace(source, target)
        print("wrote", Path(target).name, flush=True)

    def counted(path, frames, *args):
        print("frames", len(frames), flush=True)
        write_video(path, frames, *args)

    RandomCameraDataset.collate, os.replace, saving._write_video = late, told, counted


def main() -> int:
    faulthandler.dump_traceback_later(1500, exit=True)  # what waits for ever is told where
    sys.path.insert(0, str(ROOT))
    import launch
    from threestudio.utils.extensions import load_custom_modules

    load_custom_modules(ROOT / "tests" / "extensions")
    observe()
    return launch.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
