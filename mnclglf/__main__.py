"""The command mnclglf, and python -m mnclglf."""

import signal


def main() -> int:
    """Runs the command line; returns its exit code.

    Until a run catches signals itself (training/stop.py) nothing is lost by one, and the process ends at once, without
    a traceback: Python's own handler of SIGINT would raise in the middle of an import.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the caller ignores it, as of a script's &
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mnclglf.cli import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
