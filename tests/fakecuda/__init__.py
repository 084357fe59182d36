"""A pretended CUDA device, so that what a GPU would refuse fails on a machine without one.

``device`` is the device, ``kernels`` stands in for gsplat's compiled half, and
``python -m tests.fakecuda <arguments of launch.py>`` runs a whole command line on it.
"""
