"""Compare methods on a grid of representations, prompts and seeds: ``python evaluate.py --help``.

python evaluate.py --quick
python evaluate.py evaluation/grids/shapes.yaml --workers 2 --threads 1
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


def main(argv=None) -> int:
    """Run the command line; returns the exit status: 2 after a mistake."""
    from evaluation.command import main as command
    from threestudio.run.streams import print_anything, steady_streams
    from threestudio.utils.errors import UserError

    print_anything()
    with steady_streams():
        try:
            return command(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
