"""Train, validate, test or export an experiment: ``python launch.py --help``."""

import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from threestudio.run.cli import main  # noqa: E402 (found from every folder)

if __name__ == "__main__":
    status = main(home=HERE)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of Python's own shutdown
    sys.exit(status)
