"""What a run imports before it begins, and when."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

DEFERRED = """
import sys
from threestudio.run.imports import defer_torchmetrics
defer_torchmetrics()
import pytorch_lightning
heavy = {'matplotlib', 'scipy.signal', 'torchmetrics.functional', 'transformers'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
# each goes on where Lightning has been imported without most of torchmetrics
USES = {
    "a class": "import torchmetrics; assert torchmetrics.Accuracy(task='binary')",
    "a class of a module": "from torchmetrics.classification import BinaryAccuracy",
    "a function": "from torchmetrics.functional import accuracy",
    "a plot": "import torchmetrics.utilities.plot as plot; assert plot.plot_confusion_matrix",
    "a plotted metric": "import torchmetrics; m = torchmetrics.MeanMetric(); m.update(3.0)\n"
    "figure, _ = m.plot(); assert type(figure).__module__ == 'matplotlib.figure'",
    "all names": "import torchmetrics; assert {'Accuracy', 'Metric'} <= set(dir(torchmetrics))",
    "the class that Lightning has": "import torchmetrics, pytorch_lightning.utilities.types as t\n"
    "assert torchmetrics.Metric is t.Metric; torchmetrics.MeanMetric\n"
    "assert torchmetrics.Metric is t.Metric and issubclass(torchmetrics.MeanMetric, t.Metric)",
}
FORKS = """
import os, sys, traceback
for name, code in %r.items():
    if not os.fork():
        try: exec(code, {})
        except BaseException: traceback.print_exc(); print(name, flush=True)
        os._exit(0)
    os.wait()
"""


def python(code, *options, **more):
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, **more)


@pytest.mark.slow
def test_lightning_is_imported_without_most_of_torchmetrics_which_can_be_used_all_the_same():
    done = python(DEFERRED + FORKS % USES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
