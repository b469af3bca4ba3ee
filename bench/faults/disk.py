"""Disks that are full, read-only or broken, and folders that vanish: what was there survives, and the message helps."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.faults import children
from bench.faults.commands import Attacked, Place
from bench.faults.contents import differences
from bench.faults.kills import again
from bench.faults.operations import fail, list_operations, name_of
from bench.faults.outcome import Row
from bench.faults.processes import newest_step

ERRORS = {
    "open": (errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EIO),  # ENOSPC: out of inodes
    "read": (errno.EIO, errno.ESTALE, errno.EACCES),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC, errno.ESTALE),
    "rename": (errno.EBUSY, errno.EROFS, errno.EIO),
    "mkdir": (errno.ENOSPC, errno.EROFS),
    "remove": (errno.EBUSY, errno.EROFS),
    "rmdir": (errno.EBUSY,),
}
"""What each operation on a file is made to fail with."""
DOCUMENTED = (0, 1, 2)
COMMANDS = ("train", "resume", "report", "knn", "export", "embed", "pack", "unpack")
OPTIONAL = ("run/metrics.jsonl", "run/report.html", "run/queue.npz", "run/environment.json", "cache/")
UNREADABLE = Path("/proc/self/mem")  # reading it gives EIO, without a name


def attack(count: int, seed: int, folder: Path, names: tuple[str, ...] = COMMANDS) -> Iterator[Row]:
    """Lets each operation on a file fail, in every command; fills the disk; takes files and folders away.

    Args:
        count: most failing operations of each command; they are drawn.
        seed: of the operations and errors.
        folder: an empty folder to work in.
        names: some of COMMANDS.
    """
    draw, place = random.Random(seed), Place(folder)
    for name in names:
        attacked = undisturbed(place, name)
        operations = operations_of(place, attacked)
        row = Row(f"{name}: an operation on a file fails")
        for operation in draw.sample(operations, min(count, len(operations))):
            error = draw.choice(ERRORS[operation.split()[0]])
            row.add(f"{operation}: {errno.errorcode[error]}", failed(place, attacked, operation, error))
        yield row
        row = Row(f"{name}: files may have so many bytes at most")
        for _ in range(max(1, count // 8)):
            size = draw.randrange(2048, 60000)
            problems = disturbed(place, attacked, partial(limit, size))
            row.add(f"{size} bytes", problems)
        yield row
    yield unreadable(place)
    yield vanished(place, draw, max(1, count // 4))
    yield from full(place, draw, max(1, count // 2))


def undisturbed(place: Place, name: str) -> Attacked:
    """Runs a command without an attack; "resume" is the training that goes on from its middle."""
    attacked = place.undisturbed("train" if name == "resume" else name)
    return attacked._replace(before=place.half_trained()) if name == "resume" else attacked


def operations_of(place: Place, attacked: Attacked) -> list[str]:
    """Returns the operations on files that a command does, without those of the interpreter."""
    listed = place.folder / "operations"
    listed.unlink(missing_ok=True)
    place.begin(attacked.before)
    place.run(attacked.name, partial(list_operations, place.work, listed))
    return sorted({line for line in listed.read_text().splitlines() if line.split()[0] in ERRORS})


def failed(place: Place, attacked: Attacked, operation: str, error: int) -> list[str]:
    """Lets an operation of a command fail; returns what is wrong with its end and what was lost."""
    return disturbed(place, attacked, partial(fail, place.work, operation, error), operation.split(maxsplit=1)[1])


def limit(size: int) -> None:
    """Lets writes beyond so many bytes of a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disturbed(place: Place, attacked: Attacked, hook: Callable[[], object], name: str = "") -> list[str]:
    """Runs a command with an attack, and then without; returns what is wrong."""
    place.begin(attacked.before)
    kept = checkpoints_of(place.work)
    end = place.run(attacked.name, hook)
    problems = problems_of(end.code, end.text, str(place.work), name)
    if end.code != 0:
        problems += [f"{path.name} was lost" for path, data in kept.items() if not holds(path, data)]
        return problems + again(place, attacked)
    # A training goes on without what it can do without, and says so; it ends with what it is for.
    words = " ".join(end.text.split())
    told = any(said in words for said in ("cannot be written", "is not written", "cannot be kept in"))
    lost = [loss for loss in differences(place.work, attacked.true) if not (told and loss.startswith(OPTIONAL))]
    return problems + lost


def checkpoints_of(folder: Path) -> dict[Path, bytes]:
    """Returns the newest checkpoint of a run, with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("step-*.pt"))[-1:]}


def holds(path: Path, data: bytes) -> bool:
    """Returns whether a file is as it was, or is of a run that has gone on to a later one."""
    if path.exists():
        return path.read_bytes() == data
    return max(path.parent.glob("step-*.pt"), default=path) > path


def problems_of(code: int, text: str, folder: str, name: str) -> list[str]:
    """Returns what is wrong with the end of a command whose files failed: its code, or a message that does not help."""
    if "Traceback" in text:
        return [f"traceback: {text.strip()[-600:]}"]
    if code not in DOCUMENTED:
        return [f"ended with {code}: {text.strip()[-300:]}"]
    if code == 0:
        return []
    told = name_of(" ".join(text.split()).rpartition("mnclglf: ")[2])
    problems: list[str] = []
    file = Path(name_of(name))
    stem = file.name.removesuffix(" (temporary)").removesuffix("N.pt")
    above = file.parent.name.removesuffix(" (temporary)")  # of an export, which is whole or not there
    if folder not in told or not (stem in told or (above and f"{above}'" in told)):
        problems.append(f"the message does not name {name or 'a file'}: {told[:300]}")
    if "; " not in told and ". " not in told:
        problems.append(f"the message has no remedy: {told[:300]}")
    return problems


def unreadable(place: Place) -> Row:
    """Makes each file of a run fail with EIO as it is read, in the commands that read it."""
    row = Row("a file of the run fails as it is read")
    names = sorted(
        str(path.relative_to(place.trained()))
        for path in place.trained().rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )
    for command in ("train", "report", "knn", "export", "embed"):
        for name in names:
            place.begin(place.trained())
            (place.work / name).unlink()
            (place.work / name).symlink_to(UNREADABLE)
            end = place.run(command)
            row.add(f"{command}: {name}", problems_of(end.code, end.text, str(place.work), Path(name).name))
    return row


def vanished(place: Place, draw: random.Random, count: int) -> Row:
    """Renames the folder of a training run at a random time, puts it back, and gives the command again."""
    row, attacked = Row("train: the run directory vanishes"), place.undisturbed("train")
    run, aside = place.work / "run", place.work / "aside"
    while row.tried < count:
        place.begin(attacked.before)
        place.log.unlink(missing_ok=True)
        child = children.start(attacked.arguments, place.log)
        time.sleep(draw.uniform(0, attacked.seconds))
        if not run.exists():
            os.kill(child, signal.SIGKILL)
            children.wait(child, place.log)
            continue
        run.rename(aside)
        step = newest_step(aside)
        end = children.wait(child, place.log)
        problems = problems_of(end.code, end.text, str(place.work), "")
        if run.exists():  # made again, by a process that had not begun to write
            problems += ["the run is in two folders"] if newest_step(run) and newest_step(aside) else []
            shutil.rmtree(aside if newest_step(run) else run)
        if aside.exists():
            aside.rename(run)
        row.add(f"after step {step}", problems + again(place, attacked))
    return row


def full(place: Place, draw: random.Random, count: int) -> Iterator[Row]:
    """Runs commands on a small disk, then with room; yields nothing where no tmpfs can be mounted."""
    attacked = [place.undisturbed(name) for name in ("train", "report", "knn", "export", "embed", "pack")]
    place.begin(place.folder / "empty")
    mount = ["mount", "-t", "tmpfs", "none", str(place.work), "-o"]
    if subprocess.run([*mount, "size=1m"], capture_output=True).returncode:
        return
    subprocess.run(["umount", str(place.work)], check=True)
    for kind, largest in (("size", 1000), ("nr_inodes", 40)):
        row = Row({"size": "a disk of some kB", "nr_inodes": "a disk of some inodes"}[kind])
        for _ in range(count):
            command = draw.choice(attacked)
            used = used_by(command.before)[kind]
            room = used + draw.randrange(largest)
            option = f"size={room}k" if kind == "size" else f"nr_inodes={room},size=64m"
            subprocess.run([*mount, option], check=True)
            try:
                place.begin(command.before)
                kept = checkpoints_of(place.work)
                end = place.run(command.name)
                problems = problems_of(end.code, end.text, str(place.work), "")
                problems += [f"{path.name} was lost" for path, data in kept.items() if not holds(path, data)]
                subprocess.run([*mount[:-1], "-o", "remount,size=64m,nr_inodes=1000"], check=True)
                row.add(f"{command.name}, {option}", problems + again(place, command))
            finally:
                subprocess.run(["umount", str(place.work)], check=True)
        yield row


def used_by(folder: Path) -> dict[str, int]:
    """Returns the kB and the inodes that a folder takes on a tmpfs."""
    paths = [folder, *folder.rglob("*")] if folder.exists() else [folder]
    kilobytes = sum(-(-path.stat().st_size // 4096) * 4 for path in paths if path.is_file())
    return {"size": kilobytes + 4, "nr_inodes": len(paths) + 1}
