"""What runs a run: its command line, its folder, its checkpoints, and how it stops and goes on.

``threestudio.run.cli.main`` is the whole of ``launch.py``. Importing this package imports nothing.
"""
