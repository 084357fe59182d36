"""The fault test, ``python -m tests.faults`` (``make test-faults``): runs that are killed, full disks,
broken checkpoints, hostile prompts and point clouds. Not part of the ordinary tests."""
