"""What the jobs of test_batch.py do. A process imports this file for each: nothing heavy here."""

import errno
import os
import time


def double(argument, folder):
    print("doubling", argument)
    with (folder / "calls").open("a") as file:
        file.write("x")
    if argument == 13:
        raise ValueError("13 brings\nno luck")
    return 2 * argument


def fill(argument, folder):
    raise OSError(errno.ENOSPC, "No space left on device")


def wait_for_ever(argument, folder):
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
