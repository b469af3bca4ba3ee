"""Tests of making runs: once, in their own processes, resumed if stopped, and continued after a failed run."""

import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_reproduce
from rich.console import Console
from tiny_reproduce import EPOCHS, TINY, HandMade, tiny_table

from mnclglf.cli import main
from mnclglf.config import RunConfig
from mnclglf.data.datasets import load_dataset
from mnclglf.data.sources.digits import Digits
from mnclglf.reproduce import run as execute
from mnclglf.reproduce.plan import SCALES, Reproduce, Run, Table, make_table
from mnclglf.reproduce.results import missing_evaluations
from mnclglf.reproduce.run import TAKEN, held, lock_of, make_run, make_runs
from mnclglf.reproduce.table import DATASET_TITLES
from mnclglf.runs.checkpoint import list_checkpoints
from mnclglf.runs.results import load_results
from mnclglf.training.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("tiny_scale")


def silent() -> Console:
    return Console(file=io.StringIO(), width=300)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / "runs"
    folder.mkdir(parents=True)
    return folder


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Replaces mnclglf in the subprocesses by a few lines of Python; `name` is the run's."""
    program = f"import os, signal, sys, time\nname = sys.argv[-1]\n{code}"
    monkeypatch.setattr(execute, "PROGRAM", (sys.executable, "-c", program))


def test_a_run_is_trained_and_evaluated_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny_table("table5")
    run = table.run("mnclglf-digits-seed0")
    assert missing_evaluations(run, runs, table.scale) == {1: ["pretrained"], 2: ["pretrained"], 3: ["pretrained"],
                                                           4: ["pretrained", "untrained"]}  # fmt: skip
    assert make_run(run, runs, table.scale, silent()) == 0
    assert missing_evaluations(run, runs, table.scale) == {}
    assert (runs / run.name / "report.html").exists()
    assert [step for step, _ in list_checkpoints(runs / run.name / "checkpoints")] == [3, 6, 9, 12]

    def fail(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(execute, "Trainer", fail)
    monkeypatch.setattr(execute, "evaluate_run", fail)
    assert make_run(run, runs, table.scale, silent()) == 0


def test_a_run_is_evaluated_with_the_settings_of_its_scale(runs: Path) -> None:
    protocols = {"linear": {"epochs": 2, "batch_size": 32, "lr": 0.8}, "knn": {"k": 3, "temperature": 0.2}}
    scale = replace(tiny_table("table6").scale, protocols=protocols)
    run = tiny_table("table6").runs()[0]
    run.asked = {EPOCHS: ["pretrained"]}
    assert make_run(run, runs, scale, silent()) == 0
    assert missing_evaluations(run, runs, scale) == {}
    results = load_results(runs / run.name / "evaluation.json")
    assert [(result.protocol, result.representation) for result in results] == [
        (protocol, "pretrained") for protocol in protocols
    ]
    for result, settings in zip(results, protocols.values(), strict=True):
        assert {name: result.settings[name] for name in settings} == settings
    longer = replace(scale, protocols={"linear": {**protocols["linear"], "epochs": 90}})
    assert missing_evaluations(run, runs, longer) == run.asked


def test_missing_evaluations_take_their_images_from_where_they_lie_now(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, asked = load_dataset, []

    def noted(name: str, data_dir: Path | None, *, download: bool, **options: bool) -> object:
        asked.append((data_dir, download))
        return load(name, data_dir, download=download, **options)

    monkeypatch.setattr("mnclglf.training.start.load_dataset", noted)
    monkeypatch.setattr(Digits, "needs_files", True)  # stands in for a data set of the paper
    first = Reproduce(table="table6", scale="small", data_dir=Path("/a"))
    then = Reproduce(table="table5", scale="small", data_dir=Path("/b"), download=True)
    for request in (first, then):
        table = make_table(request)
        scale = replace(table.scale, protocols={"knn": {}})  # the fastest
        assert make_run(table.run("mnclglf-digits-seed0"), runs, scale, silent()) == 0
    # One training and one evaluation; then table5 has the last epoch from table6, and lacks the three before it.
    assert asked == 2 * [(Path("/a"), False)] + 3 * [(Path("/b"), True)]


def test_a_killed_run_goes_on_from_its_checkpoint(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny_table("table6")
    run = table.runs()[0]
    save, saved = Trainer._save, []

    def killed(trainer: Trainer, done: int) -> None:
        save(trainer, done)
        saved.append(done)
        if len(saved) == 2:
            raise MemoryError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", killed)
        with pytest.raises(MemoryError):
            make_run(run, runs, table.scale, silent())
    assert set(missing_evaluations(run, runs, table.scale)) == {EPOCHS}
    console = silent()
    assert make_run(run, runs, table.scale, console) == 0
    assert "resuming after step 6 of 12" in printed(console)
    assert missing_evaluations(run, runs, table.scale) == {}


def test_a_run_that_another_process_holds_is_left_to_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny_table("table6")
    first, second, *_ = table.runs()
    child(monkeypatch, "sys.exit('begun')")
    with lock_of(first.name, runs).open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        console = silent()
        assert make_run(first, runs, table.scale, console) == TAKEN
        assert "being made by another process" in printed(console)
        made = make_runs(Reproduce(table="table6", scale="small", out=runs.parent), table, runs, silent())
        assert (made.taken, first.name in made.failed, second.name in made.failed) == ([first.name], False, True)
    with held(lock_of(first.name, runs)) as mine:  # it was released
        assert mine
    assert not (runs / first.name).exists()


def test_a_run_that_was_taken_meanwhile_is_no_failure(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, f"sys.exit({TAKEN})")
    table = tiny_table("table6")
    made = make_runs(Reproduce(table="table6", scale="small", out=runs.parent), table, runs, silent())
    assert (made.failed, made.taken) == ([], [run.name for run in table.runs()])


def test_a_lock_ends_with_its_process(runs: Path) -> None:
    lock = runs / "x.lock"
    code = "import sys, time; from pathlib import Path; from mnclglf.reproduce.run import held\n"
    code += "with held(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True, env=environment(runs)
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "True\n"
        with held(lock) as mine:
            assert not mine
        holder.kill()
        holder.wait()
        with held(lock) as mine:
            assert mine
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("sys.exit('the reason')", "exit code 1"),
        ("print('the reason', flush=True); os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_a_failed_run_is_reported_and_the_others_go_on(
    end: str, how: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, f"if 'k3' in name: {end}\nopen({str(runs)!r} + '/' + name + '.made', 'w')")
    table, console = tiny_table("table6"), silent()
    monkeypatch.setattr(execute, "missing_evaluations", lambda run, *_: not (runs / f"{run.name}.made").exists())
    made = make_runs(Reproduce(table="table6", scale="small", out=runs.parent), table, runs, console)
    assert made.failed == ["mnclglf-digits-k3-seed0"]
    assert (how in printed(console), "the reason" in printed(console)) == (True, True)
    assert {path.stem for path in runs.glob("*.made")} == {run.name for run in table.runs()} - set(made.failed)


def test_a_log_and_a_path_may_hold_what_looks_like_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks brackets in a log: rich takes [/x] for the end of a style, and raises if none was begun."""
    runs = tmp_path / "[" / "x]" / "runs"
    runs.mkdir(parents=True)
    line = "RuntimeError in [/opt/dali/x:123]"
    child(monkeypatch, f"print({line!r}, flush=True); time.sleep(0.5); sys.exit(1)")
    monkeypatch.setattr(execute, "POLL_SECONDS", 0.1)
    table, console = tiny_table("table6"), silent()
    table = replace(table, rows=table.rows[:1])
    made = make_runs(Reproduce(table="table6", scale="small", out=runs.parent), table, runs, console)
    (name,) = made.failed
    assert f"{runs / name}.log ends with\n{line}\n" in printed(console)


def test_a_signal_stops_the_run_at_work_once_and_begins_no_other(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The run needs a second signal to go wrong, and says when it is ready for the first.
    child(
        monkeypatch,
        "def stop(*_):\n"
        "    signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "    time.sleep(1.5)\n"
        f"    open({str(runs)!r} + '/' + name + '.saved', 'w')\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        f"open({str(runs)!r} + '/' + name + '.ready', 'w').write(str(os.getpgid(0)))\n"
        "time.sleep(60)",
    )
    table, console = tiny_table("table6"), silent()
    first = table.runs()[0].name

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (runs / f"{first}.ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(execute, "POLL_SECONDS", 0.1)
    threading.Thread(target=interrupt).start()
    made = make_runs(Reproduce(table="table6", scale="small", out=runs.parent), table, runs, console)
    assert (made.stopped, made.failed) == (signal.SIGINT, [])
    group = int((runs / f"{first}.ready").read_text())
    assert group != os.getpgid(0)  # otherwise a terminal's Ctrl-C, which goes to our group, would be the second signal
    assert sorted(path.name for path in runs.iterdir() if path.suffix in (".ready", ".saved")) == [
        f"{first}.ready", f"{first}.saved"
    ]  # fmt: skip


# The command


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests" / "helpers")))
    return {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_processes_on_one_folder_share_the_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, tiny_reproduce.__file__, "reproduce", "table6", "--scale", "small", "--out", str(out)]
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(tmp_path)
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert {process.returncode for process in both} <= {0, TAKEN}, said
    names = [run.name for run in tiny_table("table6").runs()]
    for name in names:
        log = (out / "runs" / f"{name}.log").read_text()
        assert log.count("mnclglf on digits: 96 images") == 1  # trained by one of them
        assert log.count("evaluating after epoch 4") == 1
    done = [name for text in said for name in names if f"{name}: done in " in text]
    assert set(done) == set(names)  # both may report a run that one of them finished while the other was starting it
    markdown = (out / "table6.md").read_text()
    assert markdown.count("measured: seed 0") == 5
    assert "not run" not in markdown
    assert f"written: {out / 'table6.md'}" in said[0]


def test_the_files_hold_the_whole_table_whatever_part_is_asked_for(
    hand_made: HandMade, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_paper(method: str, dataset: str) -> RunConfig:
        return replace(TINY.configure(method, dataset), dataset=dataset)

    monkeypatch.setitem(SCALES, "paper", replace(TINY, of_paper=True, configure=of_paper))
    monkeypatch.setattr(execute, "load_images", lambda _: {})
    monkeypatch.setattr(execute, "describe_work", lambda *_: None)
    out, done = hand_made.runs.parent, Reproduce(table="table3", dataset=("cifar10", "tinyimagenet"), seeds=3)
    configs = {(row.dataset, config.seed): config for row in make_table(done).rows for config in row.configs}
    for dataset, seed, top1 in (("cifar10", 0, 0.8), ("cifar10", 2, 0.9), ("tinyimagenet", 11, 0.5)):
        config = replace(configs[dataset, 0], seed=seed)  # of MNCLGLF, the last row
        hand_made.train(config)
        hand_made.evaluate(config, top1)

    def make(request: Reproduce, table: Table, runs: Path, _: Console) -> execute.Made:
        """Two other processes finish a run meanwhile, one of the request's and one of another data set."""
        assert {row.dataset for row in table.rows} == {"cifar100"}
        for dataset, seed in (("cifar100", 0), ("tinyimagenet", 5)):
            config = replace(configs["cifar10", 0], dataset=dataset, seed=seed)
            hand_made.train(config)
            hand_made.evaluate(config, 0.6)
        return execute.Made()

    monkeypatch.setattr(execute, "make_runs", make)
    assert main(["reproduce", "table3", "--dataset", "cifar100", "--out", str(out)]) == 0
    lines = list(csv.DictReader(io.StringIO((out / "table3.csv").read_text())))
    assert len(lines) == 3 * 8
    assert {(line["dataset"], line["top1_mean"], line["state"]) for line in lines if line["row"] == "MNCLGLF"} == {
        ("cifar10", "85.00", "measured: seeds 0, 2; epoch 4 of 4; an abacus; commit abc1234"),
        ("cifar100", "60.00", "measured: seed 0; epoch 4 of 4; an abacus; commit abc1234"),
        ("tinyimagenet", "55.00", "measured: seeds 5, 11; epoch 4 of 4; an abacus; commit abc1234; seed 0 not run"),
    }
    assert {line["state"] for line in lines if line["row"] != "MNCLGLF"} == {"not run"}
    runs = {run["run"] for row in json.loads((out / "table3.json").read_text())["rows"] for run in row["runs"]}
    assert runs == {folder.name for folder in hand_made.runs.iterdir() if folder.is_dir()}
    assert [(out / "table3.md").read_text().count(f"## {title}\n") for title in DATASET_TITLES.values()] == [1, 1, 1]


def test_a_damaged_file_of_another_run_of_the_table_shows_before_any_work(
    hand_made: HandMade, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hand_made.train(replace(tiny_table("table6").rows[0].configs[0], seed=1))
    (folder / "config.json").write_text("{")
    child(monkeypatch, "sys.exit('begun')")
    assert main(["reproduce", "table6", "--scale", "small", "--out", str(hand_made.runs.parent)]) == 1
    assert f"{folder / 'config.json'} is not the configuration of a run" in capsys.readouterr().err


def test_exit_codes_and_what_is_said_at_the_end(tmp_path: Path, monkeypatch, capsys) -> None:
    # The path is one that rich would take for markup.
    arguments = ["reproduce", "table6", "--scale", "small", "--out", str(tmp_path / "[" / "x]")]
    monkeypatch.setattr(execute, "describe_work", lambda *_: None)
    for made, code, text in [
        (execute.Made(), 0, "written: "),
        (execute.Made(failed=["a"], taken=["b"]), 1, "failed: a; the same command tries them again"),
        (execute.Made(taken=["b"]), TAKEN, "being made by other processes: b;"),
        (execute.Made(stopped=signal.SIGTERM), 143, "an evaluation begins again"),
    ]:
        monkeypatch.setattr(execute, "make_runs", lambda *_, made=made: made)
        assert main(arguments) == code
        assert text in capsys.readouterr().out


def test_the_images_are_given_free_before_the_runs_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, loaded = execute.load_images, []

    def noted(runs: Sequence[Run]) -> object:
        images = load(runs)
        loaded.extend(map(weakref.ref, images.values()))
        return images

    def make(*_: object) -> execute.Made:
        assert [reference() for reference in loaded] == [None]
        return execute.Made()

    monkeypatch.setattr(execute, "load_images", noted)
    monkeypatch.setattr(execute, "make_runs", make)
    monkeypatch.setattr(execute, "measured_cost", lambda *_: "not now")
    assert main(["reproduce", "table6", "--scale", "small", "--out", str(tmp_path)]) == 0


def test_one_run_alone_adds_itself_to_the_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    only = ["--only", "mnclglf-digits-k4-seed0"]
    assert main(["reproduce", "table6", "--scale", "small", "--out", str(out), *only]) == 0
    lines = (out / "table6.csv").read_text().splitlines()
    assert [("measured: seed 0" in line) for line in lines[1:]] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("arguments", "named", "code"),
    [
        ("table3 --dataset cifar10", "CIFAR-10's files are missing", 1),
        ("table6 --scale small --only x", "'x' is no run of table6", 2),  # wrong usage
        ("table4 --dataset cifar100", "table4 is of cifar10", 2),
        ("table6 --scale small --out file/x", "file", 1),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(
    arguments: str,
    named: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["reproduce", *arguments.split()]) == code
    assert named in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_with_a_run_of_other_settings_is_refused(
    hand_made: HandMade, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tiny_table("table6")
    folder = hand_made.train(table.rows[2].configs[0])
    folder.rename(folder.with_name(table.runs()[0].name))
    child(monkeypatch, "sys.exit('begun')")
    assert main(["reproduce", "table6", "--scale", "small", "--out", str(hand_made.runs.parent)]) == 2
    assert "holds a run of other settings (objective.k: 3 -> 1); give another --out" in capsys.readouterr().err
