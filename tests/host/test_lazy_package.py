"""``import threestudio`` is light, and the built-in classes are there when they are needed."""

import json
import os
import subprocess
import sys

from tests.runs import ROOT

HEAVY = {"torch", "numpy", "pytorch_lightning", "diffusers", "transformers"}
LIGHT = (
    *("threestudio", "threestudio.utils.config", "threestudio.utils.extensions"),
    *("threestudio.run.cli", "threestudio.run.preflight"),
)
FIRST = (
    "from threestudio import *",
    "from threestudio import models",
    "import threestudio; threestudio.utils.ops.dot",
    "import threestudio.data.uncond",
    "import threestudio.models.holder",
    "import threestudio.models.renderers.nerf_volume_renderer",
    "import threestudio.systems.base",
    "import threestudio.utils.config, threestudio.utils.misc",
    "import threestudio; threestudio.register('mine')(type('Mine', (), {}))",
)
FIND = """
import threestudio
for name in ('random-camera-datamodule', 'mesh-exporter', 'implicit-volume'):
    assert threestudio.find(name).__module__.startswith('threestudio.')
"""
READ = "import threestudio; assert {'random-camera-datamodule', 'mesh-exporter'} <= {%s}"
# an extension takes a name of a built-in class that nothing has imported yet
TAKEN = """
import threestudio
try: threestudio.register('mesh-exporter')(type('Mine', (), {}))
except ValueError as error: assert 'from threestudio.models.exporters.mesh_exporter' in str(error)
else: raise AssertionError
"""
REPLACED = """
import threestudio
assert len(threestudio.__modules__) > 10
threestudio.__modules__ = {'other': int}
assert threestudio.find('other') is int
threestudio.register('new')(str)
assert threestudio.__modules__ == {'other': int, 'new': str}
"""
WARN = """
import logging, threestudio, pytorch_lightning.utilities.rank_zero as lightning
said = []
logger = logging.getLogger('pytorch_lightning')
logger.handlers = [type('H', (logging.Handler,), {'emit': lambda self, r: said.append(r.msg)})()]
threestudio.warn('mind the gap')
lightning.rank_zero_only.rank = 1
threestudio.warn('on another process')
assert said == ['mind the gap'] and threestudio.logger is logger
assert threestudio.info is lightning.rank_zero_info
"""
FORKS = """
import gc, json, os, sys, traceback
gc.disable()
import jaxtyping, numba, pytorch_lightning, scipy.spatial, torch, transformers
for code in json.load(sys.stdin):
    if not os.fork():
        try: exec(code, {'__name__': 'extension'})
        except BaseException: traceback.print_exc(); print(code, flush=True)
        os._exit(0)
    os.wait()
"""


def python(code, **options):
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, **options)


def test_the_package_is_light():
    code = f"import sys, importlib\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
    code += f"print({HEAVY!r} & set(sys.modules), dir(sys.modules['threestudio']))"
    done = python(code)
    assert done.stdout.startswith("set() [") and "'__modules__'" in done.stdout, done.stderr


def test_whatever_is_imported_first_the_built_in_classes_are_there():
    """Each in a process that has not seen the package: a fork of one that has seen the others."""
    codes = [f"{first}\n{FIND}" for first in FIRST]
    codes += [READ % "*threestudio.__modules__", TAKEN, REPLACED, WARN]
    done = python(FORKS, input=json.dumps(codes))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
