"""Tests of the setup on made-up machines: its packages, its errors, and the state after it was killed."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import setup_environment as setup
from tools.setup_environment import Gpu, Machine, Plan, SetupError

ROOT = Path(setup.__file__).resolve().parents[1]
CU126 = "https://download.pytorch.org/whl/cu126"
CU130 = "https://download.pytorch.org/whl/cu130"
CPU = "https://download.pytorch.org/whl/cpu"

NO_GPU = Machine("Linux", "x86_64")
NEW_DRIVER = Machine("Linux", "x86_64", Gpu("NVIDIA GeForce RTX 3090", "580.65.06"))
OLD_DRIVER = Machine("Linux", "x86_64", Gpu("NVIDIA GeForce RTX 3090", "550.144.03"))
ANCIENT_DRIVER = Machine("Linux", "x86_64", Gpu("NVIDIA GeForce RTX 3090", "470.256.02"))
BROKEN_SMI = Machine("Linux", "x86_64", gpu_problem="nvidia-smi failed (exit code 9): couldn't communicate")
MAC = Machine("Darwin", "arm64")
ARM_LINUX = Machine("Linux", "aarch64")


@pytest.mark.parametrize(
    ("machine", "index", "dali", "cuda", "expects_gpu"),
    [
        (NO_GPU, None, "dali-cuda13", 13, False),
        (NO_GPU, CPU, "dali-cuda13", None, False),
        (NEW_DRIVER, None, "dali-cuda13", 13, True),
        (NEW_DRIVER, CU126, "dali-cuda12", 12, True),
        (NEW_DRIVER, CU130 + "/", "dali-cuda13", 13, True),
        (NEW_DRIVER, CPU, "dali-cuda13", None, False),
        (OLD_DRIVER, CU126, "dali-cuda12", 12, True),
        (OLD_DRIVER, CPU, "dali-cuda13", None, False),
        (BROKEN_SMI, CPU, "dali-cuda13", None, False),
        (MAC, None, None, None, False),
        (ARM_LINUX, None, None, 13, False),
    ],
)
def test_plan(machine, index, dali, cuda, expects_gpu):
    plan = setup.decide(machine, index)
    assert (plan.torch_index, plan.dali_extra, plan.cuda, plan.expects_gpu) == (index, dali, cuda, expects_gpu)


@pytest.mark.parametrize(
    ("machine", "index", "extra"),
    [
        (NO_GPU, None, "faiss-cpu"),
        (NEW_DRIVER, None, "faiss-gpu"),
        (NEW_DRIVER, CPU, "faiss-cpu"),
        (OLD_DRIVER, CU126, "faiss-gpu"),
        (MAC, None, "faiss-cpu"),
        (ARM_LINUX, None, "faiss-cpu"),
    ],
)
def test_faiss_has_a_gpu_where_torch_has_one(machine, index, extra):
    assert setup.decide(machine, index).faiss_extra == extra


@pytest.mark.parametrize(
    ("machine", "index", "names"),
    [
        (OLD_DRIVER, None, ["RTX 3090", "550.144.03", "580 or newer", f"TORCH_INDEX={CU126}"]),
        (OLD_DRIVER, CU130, ["550.144.03", "580 or newer", f"TORCH_INDEX={CU126}"]),
        (ANCIENT_DRIVER, None, ["470.256.02", "580 or newer", f"TORCH_INDEX={CPU}"]),
        (ANCIENT_DRIVER, CU126, ["470.256.02", "525 or newer", f"TORCH_INDEX={CPU}"]),
        (BROKEN_SMI, None, ["exit code 9", "driver", f"TORCH_INDEX={CPU}"]),
        (BROKEN_SMI, CU126, ["exit code 9", "525 or newer", f"TORCH_INDEX={CPU}"]),
        (NO_GPU, "https://download.pytorch.org/whl/rocm6.4", ["rocm6.4", CU126]),
        (NO_GPU, "https://download.pytorch.org/whl/cu118", ["cu118", CU126]),
    ],
)
def test_stops_with_what_was_found_and_the_remedy(machine, index, names):
    with pytest.raises(SetupError) as stopped:
        setup.decide(machine, index)
    for name in names:
        assert name in str(stopped.value)


@pytest.mark.parametrize(
    ("machine", "index", "says"),
    [(NO_GPU, None, CPU), (MAC, None, "no DALI"), (ARM_LINUX, None, "no DALI"), (NEW_DRIVER, CPU, "unused")],
)
def test_says_what_is_missing_or_unused(machine, index, says):
    assert says in " ".join(setup.decide(machine, index).notes)


def test_says_nothing_where_nothing_is_missing():
    assert setup.decide(NEW_DRIVER, None).notes == ()


def test_parse_bf16_flags():
    cpuinfo = "processor\t: 0\nflags\t\t: fpu avx512_bf16 avx512f amx_bf16 amx_tile\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert setup.parse_bf16_flags(cpuinfo) == ("amx_bf16", "avx512_bf16")
    assert setup.parse_bf16_flags("Processor : ARMv8\n") == ()


@pytest.mark.parametrize(
    ("version", "has_ensurepip", "says"),
    [((3, 10), True, "PYTHON="), ((2, 7), True, "2.7"), ((3, 11), False, "python3.11-venv")],
)
def test_python_that_cannot_make_the_environment(version, has_ensurepip, says):
    assert says in setup.python_problem(version, has_ensurepip)


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13), (3, 14)])
def test_python_that_can(version):
    assert setup.python_problem(version, True) is None


FIND_PYTHON = ROOT / "tools" / "find_python.sh"
SHIM = "echo 'pyenv: python3.x: command not found' >&2; echo 'more of it' >&2; exit 127"
NO_ENSUREPIP = "echo \"cannot make virtual environments (No module named 'ensurepip')\"; exit 1"


def add_python(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def find_python(folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path or f"{folder}/first:{folder}/second"}
    command = ["/bin/sh", str(FIND_PYTHON), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_first_python_that_runs_is_taken(tmp_path):
    add_python(tmp_path / "first" / "python3.11", SHIM)
    add_python(tmp_path / "first" / "python3.12", NO_ENSUREPIP)
    (tmp_path / "first" / "python3.13").mkdir()
    right = add_python(tmp_path / "second" / "python3.13")
    add_python(tmp_path / "first" / "python3.14")
    assert find_python(tmp_path).stdout == f"{right}\n"


def test_python_behind_a_shim_of_its_name_is_taken(tmp_path):
    add_python(tmp_path / "first" / "python3.11", SHIM)
    right = add_python(tmp_path / "second" / "python3.11")
    assert find_python(tmp_path).stdout == f"{right}\n"


def test_all_lists_the_first_that_works_of_each_version(tmp_path):
    expected = [add_python(tmp_path / "first" / "python3.11"), add_python(tmp_path / "second" / "python3.14")]
    add_python(tmp_path / "second" / "python3.11")
    add_python(tmp_path / "first" / "python3.14", SHIM)
    assert find_python(tmp_path, "--all").stdout.splitlines() == [str(path) for path in expected]


def test_no_python_that_works_names_what_was_tried_and_why(tmp_path):
    shim = add_python(tmp_path / "first" / "python3.12", SHIM)
    bare = add_python(tmp_path / "second" / "python3.13", NO_ENSUREPIP)
    answer = find_python(tmp_path)
    assert (answer.returncode, answer.stdout) == (1, "")
    for line in (f"  {shim}: pyenv: python3.x: command not found\n", "  python3.11: not on PATH\n", "PYTHON="):
        assert line in answer.stderr
    assert f"  {bare}: cannot make virtual environments (No module named 'ensurepip')\n" in answer.stderr
    assert "more of it" not in answer.stderr


@pytest.mark.parametrize(("script", "says"), [(SHIM, "command not found"), ("exit 3", "without a word")])
def test_named_python_that_does_not_run_is_an_error(tmp_path, script, says):
    named = add_python(tmp_path / "a b" / "python", script)
    answer = find_python(tmp_path, str(named))
    assert (answer.returncode, answer.stdout) == (1, "")
    assert f"{named} does not do" in answer.stderr
    assert says in answer.stderr
    assert "PYTHON=" in answer.stderr


def test_the_interpreter_of_the_tests_would_be_taken(tmp_path):
    # The check itself, which the made-up ones above do not run.
    assert find_python(tmp_path, sys.executable).stdout == f"{sys.executable}\n"


def test_modules_that_are_missing_are_named(tmp_path):
    (tmp_path / "ensurepip.py").write_text("raise ImportError(\"No module named 'ensurepip'\")\n")
    bare = add_python(tmp_path / "first" / "python3.11", f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    answer = find_python(tmp_path)
    assert f"  {bare}: cannot make virtual environments (No module named 'ensurepip')" in answer.stderr
    assert f"apt install python3.{sys.version_info.minor}-venv" in answer.stderr


def test_python_of_the_venv_stays_the_choice_until_it_is_gone(tmp_path):
    other = add_python(tmp_path / "first" / "python3.11")
    own = add_python(tmp_path / "a b" / "python3.13")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").write_text(f"home = {own.parent}\nexecutable = {own}\ncommand = x\n")
    assert find_python(tmp_path).stdout == f"{own}\n"
    assert find_python(tmp_path, str(other)).stdout == f"{other}\n"
    own.unlink()
    assert find_python(tmp_path).stdout == f"{other}\n"


def test_venv_that_is_activated_does_not_build_itself(tmp_path):
    add_python(tmp_path / ".venv" / "bin" / "python3.11")
    base = add_python(tmp_path / "first" / "python3.12")
    assert find_python(tmp_path, path=f"{tmp_path}/.venv/bin:{tmp_path}/first").stdout == f"{base}\n"


@pytest.mark.parametrize("name", ["python3.12", "my python $x 'y' \"z\""])
def test_make_setup_runs_the_python_that_is_named(tmp_path, name):
    record = tmp_path / "record"
    named = add_python(tmp_path / name, f'printf "%s\\n" "$@" >> {shlex.quote(str(record))}')
    command = ["make", "setup", f"PYTHON={named}", "TORCH_INDEX=a $b"]
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert record.read_text().splitlines()[-2:] == ["tools/setup_environment.py", "--torch-index=a $b"]


def test_torch_comes_from_its_index_and_the_rest_does_not():
    constraints = "# torch==1\ntorch==2.14.1\ntorchvision==0.29.1\nnumpy==2.4.6\n"
    first, second = setup.install_commands(setup.decide(OLD_DRIVER, CU126), Path("python"), constraints)
    assert first[first.index("--index-url") + 1 :] == [CU126, "torch==2.14.1", "torchvision==0.29.1"]
    assert "--index-url" not in second
    assert second[-4:] == ["-c", "constraints.txt", "-e", ".[dev,docs,mnist5k,faiss-gpu,dali-cuda12]"]


def test_pypi_installs_by_the_locks_and_builds_only_what_has_no_wheel():
    build, rest, own = setup.install_commands(setup.decide(NEW_DRIVER, None), Path("python"), "torch==2.14.1\n")
    assert [*build[-2:], *rest[-4:]] == [
        *("-r", "locks/build.txt"),
        *("-r", "locks/base.txt", "-r", "locks/faiss-gpu.txt"),
    ]
    for command in (build, rest):
        assert "--require-hashes" in command
        assert command[command.index("--only-binary") + 1] == ":all:"
    assert own[-4:] == ["--no-deps", "--no-build-isolation", "-e", "."]


@pytest.mark.parametrize(
    ("machine", "index", "locked"),
    [(NO_GPU, None, True), (NEW_DRIVER, None, True), (NO_GPU, CPU, False), (OLD_DRIVER, CU126, False),
     (MAC, None, False), (ARM_LINUX, None, False)],
)  # fmt: skip
def test_says_whether_hashes_are_checked(machine, index, locked, capsys):
    plan = setup.decide(machine, index)
    setup.describe(machine, plan)
    assert bool(plan.locks) == locked
    assert ("hashes   checked" in capsys.readouterr().out) == locked


def test_pypi_is_one_command_and_no_dali_is_no_extra():
    (command,) = setup.install_commands(setup.decide(MAC, None), Path("python"), "torch==2.14.1\n")
    assert command[-4:] == ["-c", "constraints.txt", "-e", ".[dev,docs,mnist5k,faiss-cpu]"]


def found(cuda: str | None = "13.0", gpu: str | None = None, gpu_error: str | None = None) -> dict[str, str | None]:
    return {"torch": "2.14.1", "cuda": cuda, "gpu": gpu, "gpu_error": gpu_error, "dali": "2.4.0"}


@pytest.mark.parametrize(
    ("plan", "installed", "says"),
    [
        (Plan(None, "dali-cuda13", 13, True), found(gpu_error="no kernel image is available"), f"TORCH_INDEX={CU126}"),
        (Plan(CU126, "dali-cuda12", 12, True), found("12.6", gpu_error="no kernel image"), "TORCH_INDEX=pypi"),
        (Plan(None, None, 13, True), found(None, gpu_error="not compiled with CUDA"), f"TORCH_INDEX={CU130}"),
        (Plan(CU126, "dali-cuda12", 12, False), found("13.0"), CU126),
        (Plan(CPU, "dali-cuda13", None, False), found("13.0"), CPU),
        (Plan(CU130, "dali-cuda13", 13, False), found(None), CU130),
    ],
)
def test_an_install_that_would_end_on_the_cpu_or_is_another_build_stops(plan, installed, says):
    with pytest.raises(SetupError) as stopped:
        setup.check_installed(plan, installed)
    assert says in str(stopped.value)
    if installed["gpu_error"] and installed["cuda"]:
        assert installed["gpu_error"] in str(stopped.value)


@pytest.mark.parametrize(
    ("plan", "installed"),
    [
        (Plan(None, "dali-cuda13", 13, True), found(gpu="NVIDIA H100")),
        (Plan(None, "dali-cuda13", 13, False), found()),
        (Plan(CPU, "dali-cuda13", None, False), found(None)),
    ],
)
def test_an_install_as_planned_passes(plan, installed):
    setup.check_installed(plan, installed)


class Pip:
    """Replacement of venv, pip and the probe: makes bin/python, records the commands, is killed at `fail_at`."""

    def __init__(self, venv: Path, cuda: str | None = "13.0") -> None:
        self.venv, self.cuda = venv, cuda
        self.commands: list[str] = []
        self.fail_at: str | None = None

    def __call__(self, command, **_):
        kind = {"venv": "venv", "pip": "pip"}.get(command[2], "probe")
        self.commands.append(kind)
        if kind == "venv":
            (self.venv / "bin").mkdir()
            (self.venv / "bin" / "python").touch()
        if kind == self.fail_at:
            raise KeyboardInterrupt
        return SimpleNamespace(stdout=b"a warning\n" + json.dumps(found(self.cuda)).encode() + b"\n")

    def taken(self):
        commands, self.commands = self.commands, []
        return commands


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "setup.py").write_text("one")
    (tmp_path / "constraints.txt").write_text("torch==2.14.1\ntorchvision==0.29.1\n")
    (tmp_path / "locks").mkdir()
    for name in ("build", "base", "faiss-cpu", "faiss-gpu"):
        (tmp_path / "locks" / f"{name}.txt").write_text(name)
    return tmp_path


def test_second_setup_does_nothing(checkout, capsys):
    pip = Pip(checkout / ".venv")
    setup.set_up(checkout, NO_GPU, None, pip)
    assert pip.taken() == ["venv", "pip", "pip", "pip", "probe"]
    setup.set_up(checkout, NO_GPU, None, pip)
    assert pip.taken() == []
    assert capsys.readouterr().out.splitlines()[-1] == ".venv is up to date (torch 2.14.1, dali-cuda13)"


@pytest.mark.parametrize("step", ["venv", "pip", "probe"])
def test_killed_setup_starts_anew(checkout, step):
    pip = Pip(checkout / ".venv")
    pip.fail_at = step
    with pytest.raises(KeyboardInterrupt):
        setup.set_up(checkout, NO_GPU, None, pip)
    (checkout / ".venv" / "half-written").touch()
    pip.fail_at = None
    pip.taken()
    setup.set_up(checkout, NO_GPU, None, pip)
    assert pip.taken() == ["venv", "pip", "pip", "pip", "probe"]
    assert not (checkout / ".venv" / "half-written").exists()


def test_killed_update_starts_anew_with_the_same_index(checkout):
    pip = Pip(checkout / ".venv", cuda=None)
    setup.set_up(checkout, NO_GPU, CPU, pip)
    (checkout / "constraints.txt").write_text("torch==2.15\n")
    pip.fail_at = "pip"
    with pytest.raises(KeyboardInterrupt):
        setup.set_up(checkout, NO_GPU, None, pip)
    pip.fail_at = None
    pip.taken()
    setup.set_up(checkout, NO_GPU, None, pip)
    assert pip.taken() == ["venv", "pip", "pip", "probe"]


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt", "locks/base.txt"])
def test_changed_dependencies_are_installed_in_place(checkout, name):
    pip = Pip(checkout / ".venv")
    setup.set_up(checkout, NO_GPU, None, pip)
    (checkout / name).write_text("two")
    pip.taken()
    setup.set_up(checkout, NO_GPU, None, pip)
    assert pip.taken() == ["pip", "pip", "pip", "probe"]


def test_another_index_is_built_anew_then_remembered_until_pypi(checkout):
    pip = Pip(checkout / ".venv")
    setup.set_up(checkout, NO_GPU, None, pip)
    pip.cuda = None
    pip.taken()
    setup.set_up(checkout, NO_GPU, CPU, pip)
    assert pip.taken() == ["venv", "pip", "pip", "probe"]
    setup.set_up(checkout, NO_GPU, None, pip)
    assert pip.taken() == []
    pip.cuda = "13.0"
    setup.set_up(checkout, NO_GPU, "pypi", pip)
    assert pip.taken() == ["venv", "pip", "pip", "pip", "probe"]
    setup.set_up(checkout, NO_GPU, None, pip)
    assert pip.taken() == []


def test_gpu_that_was_added_is_checked(checkout):
    pip = Pip(checkout / ".venv")
    setup.set_up(checkout, NO_GPU, None, pip)
    with pytest.raises(SetupError, match="cannot use the GPU"):
        setup.set_up(checkout, NEW_DRIVER, None, pip)
    assert not (checkout / ".venv" / setup.STAMP).exists()


def test_driver_that_became_too_old_stops_a_finished_setup(checkout):
    pip = Pip(checkout / ".venv")
    setup.set_up(checkout, NO_GPU, None, pip)
    with pytest.raises(SetupError, match=r"550\.144\.03"):
        setup.set_up(checkout, OLD_DRIVER, None, pip)


def test_copied_checkout_does_not_trust_the_copied_environment(checkout, tmp_path_factory):
    setup.set_up(checkout, NO_GPU, None, Pip(checkout / ".venv"))
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    checkout.rename(copy)
    pip = Pip(copy / ".venv")
    setup.set_up(copy, NO_GPU, None, pip)
    assert pip.taken() == ["venv", "pip", "pip", "pip", "probe"]


def test_an_environment_of_someone_else_is_left_alone(checkout):
    theirs = checkout / ".venv" / "theirs"
    theirs.parent.mkdir()
    theirs.touch()
    with pytest.raises(SetupError, match="move it away"):
        setup.set_up(checkout, NO_GPU, None, Pip(checkout / ".venv"))
    assert theirs.exists()


def test_a_command_that_fails_is_named_with_its_exit_code(capfd):
    with pytest.raises(SetupError, match="exit code 3"):
        setup.run_command(["sh", "-c", "exit 3"])
    assert "$ sh -c exit 3" in capfd.readouterr().out
