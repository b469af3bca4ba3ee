"""bench/gpu_day.py: a day goes on after whatever a stage does, keeps what was printed, and resumes; no GPU is needed.

Stages are injected as scripts, but for the rehearsal, which is the day itself on a CPU.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import gpu_day
from bench.gpu_day import MARK, Day, main, markdown, run_day, unpacked
from bench.gpu_stages import STAGES, WRONG, Figures, Stage

ROOT = Path(__file__).resolve().parents[2]
HERE: Figures = {"gpu": "a GPU", "python": "3", "torch": "2", "triton": "3", "cuda": "13", "tree": "abc"}
# What each injected stage does in its process.
SCRIPTS = {
    "environment": f"print({MARK!r} + {json.dumps(HERE)!r})",
    "good": f"print('noise'); print({MARK!r} + '{{\"speed\": 3}}')",
    "raises": f"print({MARK!r} + '{{\"before\": 1}}'); raise ValueError('the lookup is wrong')",
    "aborts": "import os; print('before', flush=True); os.abort()",
    "hangs": "import subprocess, sys; subprocess.run([sys.executable, '-c', CHILD])",
    "hangs late": f"import time; print({MARK!r} + '{{\"speed\": 5}}', flush=True); time.sleep(60)",
    "says nothing": "print('no figures')",
    "broken figures": f"print({MARK!r} + '{{oops')",
    "no text": "import sys; sys.stdout.buffer.write(bytes([255, 254])); sys.exit(3)",
    "last": f"print({MARK!r} + '{{\"speed\": 4}}')",
}


def a_day(folder: Path, scripts: dict[str, str] | None = None, **how: object) -> Day:
    """Makes a day whose stages run these scripts."""
    path = folder / "stage.py"
    child = f"import pathlib, time; time.sleep(8); pathlib.Path({str(folder / 'child')!r}).touch()"
    path.write_text(
        f"import sys\nCHILD = {child!r}\n"
        f"exec({ {**SCRIPTS, **(scripts or {})}!r}[sys.argv[sys.argv.index('--stage') + 1]])\n"
    )
    return Day(out=folder / "day", program=[sys.executable, str(path)], **how)  # pyright: ignore[reportArgumentType]


def stages(*names: str, needs_gpu: bool = False, seconds: float = 20) -> dict[str, Stage]:
    return {name: Stage(f"Stage {name}", lambda _: iter(()), seconds, needs_gpu) for name in names}


def outcomes(results: dict[str, gpu_day.Result]) -> dict[str, str]:
    return {name: result.outcome for name, result in results.items()}


def saved(folder: Path) -> dict[str, str]:
    return {entry["stage"]: entry["outcome"] for entry in json.loads((folder / "day.json").read_text())["results"]}


def test_the_budgets_and_their_order():
    """Checks nine minutes less 15 s to unpack packs, the environment first, and what compiles for long last."""
    names = [*STAGES]
    assert sum(stage.seconds for stage in STAGES.values()) <= 540 - 15
    assert names[0] == "environment"
    assert not STAGES["environment"].needs_gpu
    assert all(stage.needs_gpu for name, stage in STAGES.items() if name != "environment")
    checks, measures = ["tests", "kernels"], ["eager", "triton", "peers", "roofline", "loaders", "faiss"]
    compiled = ["choices", "graphs", "coordinate_descent", "max_autotune"]
    order = [name for name in names if name in (*checks, *measures, *compiled)]
    assert order == [*checks, *measures, *compiled]
    assert names[-1] == "run"  # which uses the time that is left


def test_it_goes_on_after_every_kind_of_failure(tmp_path, capsys):
    injected = stages("environment", "good", "raises", "aborts")
    # Each may use what was left over, so what hangs comes before what is short: a day of its own.
    results = run_day(a_day(tmp_path), injected | stages("says nothing", "broken figures", "no text", "last"))
    assert [(name, result.outcome, result.reason) for name, result in results.items()] == [
        ("environment", "passed", ""),
        ("good", "passed", ""),
        ("raises", "failed", "exit code 1"),
        ("aborts", "failed", "exit code -6"),
        ("says nothing", "failed", "ended without its figures"),
        ("broken figures", "failed", "ended without its figures"),
        ("no text", "failed", "exit code 3"),
        ("last", "passed", ""),
    ]
    assert results["good"].figures == {"speed": 3}
    assert results["raises"].figures == {"before": 1}  # what came before the failure is kept
    assert "ValueError: the lookup is wrong" in results["raises"].output
    assert results["aborts"].output.startswith("before")
    assert saved(tmp_path) == outcomes(results)
    text = (tmp_path / "day.md").read_text()
    assert text == markdown([*results.values()])
    assert "3 passed, 5 failed" in text
    assert "- speed: 4" in text
    assert f"| Stage good | passed | {results['good'].seconds:.1f} | 20 |" in text
    assert (tmp_path / "day" / "good.log").read_text().splitlines()[1] == "noise"
    assert "Stage raises ... failed: exit code 1" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "figures"), [("hangs", {}), ("hangs late", {"speed": 5})])
def test_a_stage_is_killed_with_its_children_and_keeps_what_it_printed(name, figures, tmp_path):
    results = run_day(a_day(tmp_path), stages(name, seconds=3) | stages("last"))
    assert results[name].outcome == "timed out"
    assert "stopped after 3 s" in results[name].reason
    assert results[name].figures == figures
    assert results["last"].outcome == "passed"
    time.sleep(8)
    assert not (tmp_path / "child").exists()
    assert "| timed out: stopped after 3 s |" in (tmp_path / "day.md").read_text()


def test_a_stage_may_use_what_those_before_it_left(tmp_path):
    patient = {"slow": f"import time; time.sleep(4); print({MARK!r} + '{{\"speed\": 1}}')"}
    results = run_day(a_day(tmp_path, patient), stages("good", seconds=20) | stages("slow", seconds=2))
    assert outcomes(results) == {"good": "passed", "slow": "passed"}


def test_the_last_stage_is_told_all_the_time_that_is_left(tmp_path):
    told = "import sys; seconds = float(sys.argv[sys.argv.index('--seconds') + 1]); "
    told += f"print({MARK!r} + '{{\"told\": %f}}' % seconds)"
    results = run_day(a_day(tmp_path, {"good": told, "last": told}), stages("environment", "good", "last", seconds=20))
    assert results["good"].figures["told"] == 20
    assert 40 < results["last"].figures["told"] <= 60


def test_what_was_done_is_on_disk_before_the_next_stage(tmp_path):
    path = tmp_path / "day.json"
    look = (
        f"import json; found = json.load(open({str(path)!r}))['results']; "
        f"print({MARK!r} + json.dumps({{'saved': [entry['outcome'] for entry in found]}}))"
    )
    results = run_day(a_day(tmp_path, {"last": look}), stages("good", "raises", "last"))
    assert results["last"].figures == {"saved": ["passed", "failed", "cut"]}  # cut: what a kill now would leave
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day", "day.json", "day.md", "stage.py"]


def test_a_second_call_goes_on_where_the_first_was_cut(tmp_path):
    """Checks that what passed is not run again, and that what failed is, with the figures of both attempts."""
    injected = stages("environment", "good", "raises", "last")
    run_day(a_day(tmp_path), injected)
    mended = {"good": "raise AssertionError('ran again')", "raises": f"print({MARK!r} + '{{\"after\": 2}}')"}
    results = run_day(a_day(tmp_path, mended), injected)
    assert set(outcomes(results).values()) == {"passed"}
    assert results["good"].figures == {"speed": 3}
    assert results["raises"].figures == {"before": 1, "after": 2}
    assert "the lookup is wrong" in (tmp_path / "day" / "raises.log").read_text()  # of the first attempt


def test_a_call_that_is_cut_leaves_the_results_of_later_stages(tmp_path):
    injected = stages("environment", "raises", "last")
    run_day(a_day(tmp_path), injected)
    look = (
        f"import json, shutil; shutil.copy({str(tmp_path / 'day.json')!r}, {str(tmp_path / 'then.json')!r}); {{}}['x']"
    )
    run_day(a_day(tmp_path, {"raises": look}), injected)
    then = {entry["stage"]: entry["outcome"] for entry in json.loads((tmp_path / "then.json").read_text())["results"]}
    assert then == {"environment": "passed", "raises": "cut", "last": "passed"}


@pytest.mark.parametrize("name", ["gpu", "torch", "triton", "cuda", "python", "tree", "driver"])
def test_another_device_version_or_tree_starts_anew_and_loses_nothing(name, tmp_path, capsys):
    name = "driver, power limit, clocks, temperature" if name == "driver" else name
    injected = stages("environment", "good")
    run_day(a_day(tmp_path), injected)
    other = f"print({MARK!r} + {json.dumps({**HERE, name: 'another, 30'})!r})"
    mended = {"environment": other, "good": f"print({MARK!r} + '{{\"speed\": 9}}')"}
    assert run_day(a_day(tmp_path, mended), injected)["good"].figures == {"speed": 9}
    assert f"{name}: " in capsys.readouterr().out
    (aside,) = tmp_path.glob("day-until-*.json")
    assert json.loads(aside.read_text())["results"][1]["figures"] == {"speed": 3}
    assert "noise" in (aside.with_suffix("") / "good.log").read_text()
    # The GPU is warmer now, which is no other device.
    warmer = other.replace("another, 30", "another, 60")
    results = run_day(a_day(tmp_path, {**mended, "environment": warmer, "good": "1 / 0"}), injected)
    assert (results["good"].outcome == "passed") == name.startswith("driver")


def test_anew_runs_what_has_passed_and_sets_the_old_aside(tmp_path):
    injected = stages("environment", "good")
    run_day(a_day(tmp_path), injected)
    run_day(a_day(tmp_path), injected, anew=True)
    run_day(a_day(tmp_path), injected, anew=True)
    assert len([*tmp_path.glob("day-until-*.json")]) == 2
    assert (tmp_path / "day" / "good.log").read_text().count("noise") == 1


def test_a_damaged_report_is_set_aside(tmp_path):
    injected = stages("environment", "good")
    run_day(a_day(tmp_path), injected)
    (tmp_path / "day.json").write_text("{not whole")
    assert set(outcomes(run_day(a_day(tmp_path), injected)).values()) == {"passed"}
    assert [path.read_text() for path in tmp_path.glob("day-until-*.json")] == ["{not whole"]


@pytest.mark.parametrize("signals", [signal.SIGINT, signal.SIGTERM])
def test_a_day_that_is_stopped_ends_its_stage_and_keeps_what_it_printed(signals, tmp_path):
    started, ended = tmp_path / "started", tmp_path / "ended"
    hang = (
        f"import pathlib, time; print({MARK!r} + '{{\"speed\": 7}}', flush=True); "
        f"pathlib.Path({str(started)!r}).touch(); time.sleep(8); pathlib.Path({str(ended)!r}).touch()"
    )
    day = a_day(tmp_path, {"hang": hang})
    code = (
        "import pathlib, signal; from bench.gpu_day import Day, run_day, stop; from bench.gpu_stages import Stage; "
        "signal.signal(signal.SIGTERM, stop); "
        f"run_day(Day(out=pathlib.Path({str(day.out)!r}), program={day.program!r}), "
        "{'hang': Stage('Hang', None, 60, False)})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as run:
        while not started.exists():
            assert run.poll() is None, "the day ended before its stage began"
            time.sleep(0.05)
        run.send_signal(signals)
        run.wait(timeout=30)
    time.sleep(8.5)
    assert not ended.exists()
    (result,) = json.loads((tmp_path / "day.json").read_text())["results"]
    assert (result["outcome"], result["figures"]) == ("cut", {"speed": 7})


def test_without_a_gpu_its_stages_are_named_and_not_run(tmp_path):
    no_gpu = {"environment": f"print({MARK!r} + {json.dumps({**HERE, 'gpu': 'none'})!r})"}
    injected = stages("environment") | stages("raises", needs_gpu=True)
    assert run_day(a_day(tmp_path, no_gpu), injected)["raises"].reason == "torch sees no CUDA device"
    assert "not run: torch sees no CUDA device" in (tmp_path / "day.md").read_text()
    results = run_day(a_day(tmp_path, no_gpu, rehearse=True), injected)
    assert results["raises"].outcome == "failed"  # a rehearsal runs it


def test_packs_are_found_before_what_is_installed(tmp_path):
    """Checks a tar file whose folder is `pack`, as made by tools/make_pack.py, and a plain folder."""
    made = tmp_path / "made"
    (made / "pack" / "deep").mkdir(parents=True)
    (made / "pack" / "carried.py").write_text("value = 5")
    (made / "pack" / "deep" / "library.so.2").touch()
    with tarfile.open(tmp_path / "made.tar.xz", "w:xz") as archive:
        archive.add(made / "pack", "pack")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "torch.py").write_text("value = 6")
    script = f"import carried, json, os, torch; print({MARK!r} + json.dumps({{'sum': carried.value + torch.value}}))"
    with unpacked([tmp_path / "made.tar.xz", plain]) as packs:
        day = a_day(tmp_path, {"last": script}, packs=packs)
        assert run_day(day, stages("last"))["last"].figures == {"sum": 11}
        environment = day.environment()
        assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(packs[0] / "deep")
        assert environment["MNCLGLF_PACK"].split(os.pathsep) == [str(pack) for pack in packs]
    assert not packs[0].exists()  # the temporary folder
    assert plain.exists()


def test_a_pack_that_is_none_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    (tmp_path / "torn.tar").write_bytes(b"torn")
    assert main(["--out", str(tmp_path / "day"), "--pack", str(tmp_path / "torn.tar")]) == 2
    monkeypatch.setenv("MNCLGLF_PACK", str(tmp_path / "missing"))
    assert main(["--out", str(tmp_path / "day")]) == 2
    said = capsys.readouterr().err
    assert "torn.tar" in said
    assert "missing" in said
    assert "MNCLGLF_PACK" in said
    assert not (tmp_path / "day.json").exists()


def test_a_wrong_figure_fails_its_stage(monkeypatch, tmp_path):
    def wrong(_: object):
        yield {WRONG: ["the first"]}
        yield {WRONG: []}

    monkeypatch.setitem(STAGES, "wrong", Stage("Wrong", wrong, 60))
    assert main(["--rehearse", "--out", str(tmp_path), "--stage", "wrong"]) == 1
    print_wrong = f'print({MARK!r} + \'{{"wrong": ["a"]}}\'); print({MARK!r} + \'{{"wrong": ["b"]}}\'); sys.exit(1)'
    result = run_day(a_day(tmp_path, {"last": print_wrong}), stages("last"))["last"]
    assert (result.outcome, result.figures) == ("failed", {"wrong": ["a", "b"]})
    result = run_day(a_day(tmp_path), stages("last"))["last"]  # mended
    assert (result.outcome, result.figures) == ("passed", {"speed": 4})


def test_the_steps_stand_beside_the_compiled_one():
    def step(name: str, milliseconds: float) -> gpu_day.Result:
        return gpu_day.Result(name, f"Step {name}", 10, "passed", figures={"median step, ms": milliseconds})

    text = markdown([step("eager", 27.6), step(gpu_day.BASELINE, 16.2), step("max_autotune", 13.5)])
    assert "| Step eager | 27.6 | - | - | - | - | 0.587 | - |" in text
    assert "| Step max_autotune | 13.5 | - | - | - | - | 1.200 | - |" in text


def test_a_stage_runs_by_itself(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_day", "--stage", "environment", "--out", str(tmp_path)]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    figures = json.loads(text.splitlines()[-1].removeprefix(MARK))
    assert {*gpu_day.SAME} - {"driver, power limit, clocks, temperature"} <= set(figures)
    assert {"compiler", "cores", "not installed"} <= set(figures)


def test_the_process_that_starts_the_stages_does_not_load_torch():
    code = "import sys, bench.gpu_day; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_the_whole_day_is_rehearsed_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_day", "--rehearse", "--out", str(tmp_path / "day")]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "XDG_CACHE_HOME": str(tmp_path / "own")}
    environment = {**os.environ, **caches}  # compiles and chooses as on a bare machine
    environment.pop("MNCLGLF_TEST_GPU", None)
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    results = {entry["stage"]: entry for entry in json.loads((tmp_path / "day.json").read_text())["results"]}
    assert list(results) == list(STAGES)
    assert {name: entry["outcome"] for name, entry in results.items()} == dict.fromkeys(STAGES, "passed"), (
        printed.stdout
    )
    figures = {name: entry["figures"] for name, entry in results.items()}
    assert all(figures.values())
    for name in ("eager", "triton", "graphs", "coordinate_descent", "max_autotune"):
        assert figures[name]["median step, ms"] > 0, name
        assert figures[name]["kernels"] == ("torch" if name == "eager" else "triton")
    # Steps of a kind start from the same weights and see the same noise.
    for names in (("eager", "triton"), ("graphs", "coordinate_descent", "max_autotune")):
        first = [float(figures[name]["first losses"].split(",")[0]) for name in names]
        assert first == pytest.approx([first[0]] * len(first), rel=1e-4)
    assert " passed" in figures["tests"]["result"]
    assert len(figures["peers"]["steps, eager"]) == 5
    assert {row["part"] for row in figures["roofline"]["parts of the eager step"]} > {
        "matrix products",
        "optimizer",
        "together",
    }
    assert len(figures["roofline"]["launches"]) > 10
    assert {row["loader"] for row in figures["loaders"]["loaders"]} >= {"resident", "torchvision (reference)"}
    assert {row["lookup"] for row in figures["faiss"]["lookups"]} >= {"torch", "triton"}
    assert [row["setting"] for row in figures["choices"]["settings"][:2]] == ["safe", "all"]
    assert all(float(row["ms"]) > 0 for row in figures["choices"]["settings"])
    assert figures["choices"]["taken"].startswith(("safe: ", "all: "))
    assert len(figures["tune"]["configurations"]) > 2
    assert figures["run"]["data set"] in ("fashion_mnist", "mnist5k")
    assert {"k-NN, pretrained", "k-NN, untrained", "k-NN, raw pixels"} <= set(figures["run"])
    left_out = [name for name, entry in figures.items() if "left out" in entry]
    assert left_out == ([] if find_spec("lightly") else ["peers"])
