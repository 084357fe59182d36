"""Runs the tests of every method on every model family, and makes a table of what they did.

    python benchmarks/model_methods.py                      # all of them, some minutes
    python benchmarks/model_methods.py --families sana      # these again, the others as they are
    python benchmarks/model_methods.py --methods lods-dds   # or these, on every family

tests/methods/test_every_family.py notes for each cell what it has asserted: two steps with a tiny
random model, a resumed run that equals one that was not interrupted, a file of the learned part
that is taken back, and a LoRA that stock diffusers loads and that predicts the same there. A cell
whose test failed says so. Into benchmarks/results/model_methods.csv and docs/model-methods.md.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from timing import ROOT, write_table

TEST = "tests/methods/test_every_family.py"
CSV = ROOT / "benchmarks/results/model_methods.csv"
PAGE = ROOT / "docs/model-methods.md"
FIELDS = ("family", "method", "did")
WORDS = {
    "ran": "ran two steps",
    "resumed": "resumed",
    "saved": "saved",
    "exported": "exported",
    "failed": "**failed**",
}
TEXT = """# Every method on every model family

Made by `python benchmarks/model_methods.py` of the results of
`tests/methods/test_every_family.py` ([CSV](../benchmarks/results/model_methods.csv)), on tiny
models of random weights that have the parts and the layout of the real ones. It says that a method
works with a family, and nothing about pictures.

- *ran two steps*: the losses are finite, and the pictures move.
- *resumed*: the state is saved and loaded by a new run of the method, whose third step then ends
  where three steps without a break do, bit for bit.
- *saved*: the file of the learned part is taken back by a new run of the method.
- *exported*: stock diffusers loads the LoRA file, and its network predicts what ours does. PixArt's
  pipeline has no `load_lora_weights`: there peft loads the file into the pipeline's transformer
  ([how](models.md#sana-and-pixart-sigma)).

Methods that edit are given random pictures as what was there before, and a text of them.

Methods that learn nothing have no file to save, and a learned embedding is a file of its own, which
pipelines of diffusers take as `prompt_embeds` and not as a file.

"""


def run_tests(families: list[str], methods: list[str]) -> list[dict[str, str]]:
    """One row for each cell of these families and methods (of all, where none is named)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # "sd-" is in no other family's name, and "-lods-rfds]" ends no other method's
        pieces = [f"[{family}-" for family in families], [f"-{name}]" for name in methods]
        words = " and ".join(f"({' or '.join(each)})" for each in pieces if each)
        chosen = ["-k", words] if words else []
        command = [sys.executable, "-m", "pytest", TEST, "-m", "slow or not slow", "-q", "-n", "0"]
        subprocess.run([*command, f"--junitxml={report}", *chosen], cwd=ROOT, check=False)
        if not report.exists():
            raise SystemExit("pytest made no report: see above")
        return list(cells(ElementTree.parse(report)))


def cells(report):
    """The cells of a report of pytest."""
    for case in report.iter("testcase"):
        noted = [p.get("value") for p in case.iter("property") if p.get("name") == "cell"]
        if noted:
            family, method, did = noted[0].split(" ", 2)
        else:
            family, method = case.get("name").split("[")[1].rstrip("]").split("-", 1)
            did = "failed"
        yield dict(zip(FIELDS, (family, method, did)))


def read_table() -> list[dict[str, str]]:
    """The rows of the last run."""
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def page(rows: list[dict[str, str]]) -> str:
    """The page of these rows."""
    from tests.families import FAMILIES

    families = [name for name in FAMILIES if any(row["family"] == name for row in rows)]
    methods = sorted({row["method"] for row in rows})
    found = {(row["family"], row["method"]): row["did"].split() for row in rows}
    lines = [
        f"| method | {' | '.join(FAMILIES[name].title for name in families)} |",
        f"| --- |{' --- |' * len(families)}",
    ]
    for method in methods:
        words = [
            ", ".join(WORDS[word] for word in found.get((family, method), [])) or "not run"
            for family in families
        ]
        lines.append(f"| `{method}` | {' | '.join(words)} |")
    return TEXT + "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", default=[], help="of tests/families.py")
    parser.add_argument("--methods", nargs="+", default=[], help="by name, as lods-sds")
    args = parser.parse_args()
    rows = run_tests(args.families, args.methods)
    new = {(row["family"], row["method"]) for row in rows}
    kept = [row for row in read_table() if (row["family"], row["method"]) not in new]
    rows = sorted(kept + rows, key=lambda row: (row["family"], row["method"]))
    write_table(CSV, rows)
    PAGE.write_text(page(rows))
    failed = [f"{row['method']} on {row['family']}" for row in rows if row["did"] == "failed"]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    print(PAGE)


if __name__ == "__main__":
    main()
