"""The signal of a closed terminal, which ``nohup`` leaves ignored for all that it starts."""

import signal


def hear_hangups() -> None:
    """Let the processes that are started from here hear it, whoever started this one."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
