"""Starts the ranks of a run on this machine (--gpus), by torchrun, and runs a command as one of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from rich.console import Console

from mnclglf.commands.base import Command, Shared
from mnclglf.config import EngineConfig, UsageError
from mnclglf.runs.console import say
from mnclglf.runs.files import with_remedy

WRONG_USAGE = 2  # exit code
RESTARTS = 3  # times that torchrun starts all ranks again after one was killed
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # that torchrun hands on to the ranks, which save
# Others wait while rank 0 fits a logistic regression or writes a file; one that ends is noticed at once all the same.
WAIT_SECONDS = 86400.0


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Runs a command of mnclglf in `count` processes and waits for them.

    Returns:
        0; the exit code of the first rank that failed; 128 + N if stopped by signal N.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a rank prints why it failed
    how = ["--standalone", f"--nproc-per-node={count}", f"--max-restarts={RESTARTS}", f"--signals-to-handle={SIGNALS}"]
    try:
        run(get_args_parser().parse_args([*how, "-m", "mnclglf", *arguments]))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def run_rank(run: Callable[[bool], int]) -> int:
    """Runs a command as a rank that torchrun started; of the ranks that fail, the first prints why.

    Args:
        run: runs the command and returns its exit code; true as its argument leaves out what rank 0 prints.

    Returns:
        The exit code; at once the code with which the run ended before torchrun started it again.
    """
    from mnclglf.training.pulse import describe_loss, earlier_end, is_of_messages, tell_end
    from mnclglf.training.ranks import RankError, ranks_of_environment

    ranks = ranks_of_environment()
    if ranks.count == 1:
        return run(False)
    if (code := earlier_end()) is not None:
        return code
    if not ranks.writes:
        logging.disable(logging.WARNING)  # rank 0 prints the same
    try:
        code = run(not ranks.writes)
        if code:
            tell_end(code)
        return code
    except Exception as error:
        lost = is_of_messages(error)
        text = describe_loss(ranks.count, error) if lost else error_text(error)
        lost = lost or isinstance(error, RankError)
        code = exit_code_of(error)
        if code is None:
            raise
        told = isinstance(error, RankError) and error.told
        if not told and tell_end(None if lost else code):
            say(Console(stderr=True), f"mnclglf: rank {ranks.rank}: {text}", style="bold red")
        return code


def exit_code_of(error: Exception) -> int | None:
    """Returns the exit code after an error whose message is for the user; None for a fault of the program."""
    if isinstance(error, UsageError):  # a setting that does not fit the images, the machine or the run
        return WRONG_USAGE
    return 1 if isinstance(error, ValueError | OSError | RuntimeError | ImportError | MemoryError) else None


def error_text(error: Exception) -> str:
    """Returns the message of an error; one of the system, which says what is wrong, gets what can be done."""
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}; take fewer or smaller images"
    return with_remedy(error)


def execute_on_ranks(command: Command, console: Console) -> int:
    """Runs a command other than train in a process that torchrun started; only rank 0 prints.

    Returns:
        The exit code of rank 0, on all ranks that share the work; else 0 on other ranks.

    Raises:
        RankError: another rank ended, or does not answer.
    """
    from mnclglf.training.pulse import describe_loss, is_of_messages
    from mnclglf.training.ranks import RankError, join, leave, ranks_of_environment
    from mnclglf.training.start import choose_device

    ranks = ranks_of_environment()
    if not isinstance(command, Shared):
        return command.execute(console) if ranks.writes else 0
    console.quiet = not ranks.writes
    join(ranks, choose_device(EngineConfig(device=command.shared_device)), WAIT_SECONDS)
    try:
        code = command.execute(console)
        code = int(ranks.from_first(str(code).encode))  # waits for what rank 0 does alone
    except RuntimeError as error:
        if ranks.count > 1 and is_of_messages(error):
            raise RankError(describe_loss(ranks.count, error, "Give the same command again")) from error
        raise
    leave()
    return code
