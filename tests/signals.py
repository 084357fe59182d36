"""Signals that ``nohup`` and shells without job control leave ignored for all that they start."""

import signal


def hear_signals() -> None:
    """Let a closed terminal and Ctrl-C be heard from here on, and by the processes that are
    started from here, whoever started this one."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
