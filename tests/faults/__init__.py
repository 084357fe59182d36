"""The fault test, ``python -m tests.faults`` (``make test-faults``): killed runs, full disks, and
broken checkpoints, prompts and point clouds. Not part of the ordinary tests."""
