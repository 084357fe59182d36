"""The fault test, ``python -m tests.faults`` (``make test-faults``): killed and interrupted runs,
runs that start together, full disks, and broken or hostile checkpoints, prompts and point clouds.
Not part of the ordinary tests."""
