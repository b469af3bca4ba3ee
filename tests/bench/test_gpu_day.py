"""The GPU report goes on after whatever a stage does, and says what it did; stages are injected, no GPU is needed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_report
from bench.gpu_report import MARK, main, markdown, report
from bench.gpu_stages import STAGES, Figures, Stage

ROOT = Path(__file__).resolve().parents[2]
# What each injected stage does in its process.
SCRIPTS = {
    "good": f"print('noise'); print({MARK!r} + '{{\"speed\": 3}}')",
    "raises": "print('about to'); raise ValueError('the lookup is wrong')",
    "aborts": "import os; print('before', flush=True); os.abort()",
    "hangs": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "says nothing": "print('no figures')",
    "broken figures": f"print({MARK!r} + '{{oops'); import sys; sys.exit(4)",
    "no text": "import sys; sys.stdout.buffer.write(bytes([255, 254])); sys.exit(3)",
    "last": f"print({MARK!r} + '{{\"speed\": 4}}')",
}


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """A command that runs the script of the stage that is appended to it."""
    path = tmp_path / "stage.py"
    path.write_text(f"import sys\nexec({SCRIPTS!r}[sys.argv[1]])\n")
    return [sys.executable, str(path)]


def stages(*names: str, needs_gpu: bool = False, limit: float = 20) -> dict[str, Stage]:
    return {name: Stage(f"Stage {name}", dict, limit, needs_gpu) for name in names}


def test_it_goes_on_after_every_kind_of_failure(program, tmp_path, capsys):
    injected = stages(*SCRIPTS) | stages("hangs", limit=1)
    results = report(injected, tmp_path / "report", program)
    assert [(result.stage, result.outcome, result.reason) for result in results] == [
        ("good", "passed", ""),
        ("raises", "failed", "exit code 1"),
        ("aborts", "failed", "exit code -6"),
        ("hangs", "timed out", "ran longer than 1 s"),
        ("says nothing", "failed", "ended without its figures"),
        ("broken figures", "failed", "exit code 4"),
        ("no text", "failed", "exit code 3"),
        ("last", "passed", ""),
    ]
    assert results[0].figures == {"speed": 3}
    assert "ValueError: the lookup is wrong" in results[1].output
    assert results[2].output.startswith("before")
    assert results[3].seconds < 10  # its child, which holds the output open, was ended too
    saved = json.loads((tmp_path / "report.json").read_text())
    assert [result["outcome"] for result in saved] == [result.outcome for result in results]
    text = (tmp_path / "report.md").read_text()
    assert text == markdown(results)
    assert "2 passed, 5 failed, 1 timed out" in text
    assert "| Stage hangs | timed out: ran longer than 1 s |" in text
    assert "- speed: 4" in text
    assert "Stage raises ... failed: exit code 1" in capsys.readouterr().out


def test_what_was_done_is_on_disk_before_the_next_stage(program, tmp_path):
    out = tmp_path / "report"
    names = list(SCRIPTS)
    script = f"import json; print({MARK!r} + json.dumps({{'saved': len(json.load(open({str(out) + '.json'!r})))}}))"
    Path(program[-1]).write_text(f"import sys\nexec({{**{SCRIPTS!r}, 'last': {script!r}}}[sys.argv[1]])\n")
    results = report(stages("good", "raises", "last"), out, program)
    assert results[-1].figures == {"saved": 2}
    assert names[-1] == "last"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "stage.py"]


def test_without_a_gpu_its_stages_are_named_and_not_run(program, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu, cpu = stages("raises", needs_gpu=True), stages("good")
    results = report(gpu | cpu, tmp_path / "report", program)
    assert [(result.outcome, result.reason) for result in results] == [
        ("not run", "torch sees no CUDA device"),
        ("passed", ""),
    ]
    assert "not run: torch sees no CUDA device" in (tmp_path / "report.md").read_text()


def test_a_failure_is_the_exit_code(monkeypatch, tmp_path):
    def raises() -> Figures:
        raise ZeroDivisionError

    injected = {"raises": Stage("Raises", raises, 60, needs_gpu=False)}
    monkeypatch.setitem(STAGES, "wrong", Stage("Wrong", lambda: {gpu_report.WRONG: ["a"]}, 60, needs_gpu=False))
    assert main(["--stage", "wrong"]) == 1
    for name, code in (("environment", 0), ("raises", 1)):
        chosen = {name: STAGES.get(name) or injected[name]}
        monkeypatch.setattr("bench.gpu_report.STAGES", chosen)
        assert main(["--out", str(tmp_path / name)]) == code


@pytest.mark.parametrize("failing", [None, "graphs", "faiss_gpu"])
def test_what_has_passed_is_remembered(failing, monkeypatch, tmp_path):
    remembered = []
    monkeypatch.setattr(gpu_report, "remember_proof", remembered.append)
    outcomes: dict[str, gpu_report.Outcome] = {name: "failed" if name == failing else "passed" for name in STAGES}
    results = [gpu_report.Result(name, name, outcome) for name, outcome in outcomes.items()]
    monkeypatch.setattr(gpu_report, "report", lambda *_: results)
    main(["--out", str(tmp_path / "report")])
    assert set(STAGES) > gpu_report.PROOF
    assert remembered == ([] if failing == "graphs" else [gpu_report.DEVICE])


def test_a_stage_runs_by_itself():
    command = [sys.executable, "-m", "bench.gpu_report", "--stage", "environment"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    figures = json.loads(text.splitlines()[-1].removeprefix(MARK))
    assert {"python", "torch", "triton", "gpu", "compiler"} <= set(figures)


def test_an_interrupted_report_ends_its_stage(program, tmp_path):
    started, ended = tmp_path / "started", tmp_path / "ended"
    Path(program[-1]).write_text(
        f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(10); "
        f"pathlib.Path({str(ended)!r}).touch()"
    )
    code = (
        "import pathlib, sys; from bench.gpu_report import report; from bench.gpu_stages import Stage; "
        f"report({{'x': Stage('X', dict, 60, False)}}, pathlib.Path({str(tmp_path / 'report')!r}), {program!r})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as run:
        while not started.exists():
            assert run.poll() is None, "the report ended before its stage began"
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        run.wait(timeout=30)
    time.sleep(10.5)
    assert not ended.exists()
