"""``launch.py`` on the pretended device: python -m tests.fakecuda [option] <arguments of launch.py>

--without-gsplat     gsplat has no kernels, as without a CUDA toolkit
--count STEP         print what makes the CPU wait for the GPU in this step of the training
--fault              a fault for the tests: cameras stay on the CPU
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def count_waits(step: int) -> None:
    """From now on, print the waits of the training's batch number `step`, counted from 0."""
    from tests.fakecuda import device
    from threestudio.systems.base import BaseSystem

    start, open_ = BaseSystem.on_train_batch_start, []

    def counted(self, batch, batch_idx, unused=0):
        for context in open_:
            context.__exit__(None, None, None)
            for line, times in device.waits.most_common():
                print(f"waits {times} {line}", flush=True)
        open_.clear()
        if batch_idx == step:
            open_.append(device.counting())
            open_[0].__enter__()
        return start(self, batch, batch_idx, unused)

    BaseSystem.on_train_batch_start = counted


def keep_cameras_on_the_cpu() -> None:
    from pytorch_lightning import LightningModule

    LightningModule.transfer_batch_to_device = lambda self, batch, device, loader: batch


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--without-gsplat", action="store_true")
    parser.add_argument("--count", type=int)
    parser.add_argument("--fault", action="store_true")
    options, argv = parser.parse_known_args()
    sys.path.insert(0, str(ROOT))
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    import launch
    from tests.fakecuda import device, kernels
    from threestudio.utils.extensions import load_extension

    load_extension(ROOT / "custom" / "threestudio-lods")
    with device.pretended_gpu():
        kernels.install(not options.without_gsplat)
        if options.count is not None:
            count_waits(options.count)
        if options.fault:
            keep_cameras_on_the_cpu()
        return launch.main(argv)


if __name__ == "__main__":
    sys.exit(main())
