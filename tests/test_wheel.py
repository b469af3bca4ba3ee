"""Tests of what a user of pip has: each wheel, alone with its requirements, in a fresh virtual environment.

tools/smoke_pythons.py runs them with each other Python.
"""

import shlex
from pathlib import Path

import pytest
from wheels import Environment, build_kernels_wheel, build_wheel

pytestmark = pytest.mark.slow

TINY = shlex.split(
    "--image-size 8 --train-images 320 --width 2 --projector-width 16 --predictor-width 8 --queue-size 80 --epochs 1 "
    "--batch-size 64"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("fresh environment")  # with a blank, as a user's folder may have
    return Environment(folder / "venv", build_wheel(folder))


def test_every_command_of_a_newcomer_works(environment: Environment, tmp_path: Path) -> None:
    for command, says in (
        (["--version"], "mnclglf 0.1.0\n"),
        (["data", "inspect", "digits"], "1,447 images"),
        (["train", "--dataset", "digits", "--recipe", "quick", *TINY], "report: "),
        (["knn", "runs/mnclglf-digits-quick-seed0"], "report: "),
        (["logistic", "runs/mnclglf-digits-quick-seed0"], "report: "),
        (["report", "runs/mnclglf-digits-quick-seed0"], "report: "),
        (["train", "--help"], "--projector-width"),
        (["--print-completion", "bash"], "complete -F"),
    ):
        done = environment.run("mnclglf", *command, cwd=tmp_path)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert says in done.stdout, command
    report = tmp_path / "runs" / "mnclglf-digits-quick-seed0" / "report.html"
    assert "Logistic regression" in report.read_text()


def test_the_doctor_of_a_base_install_names_each_extra_and_finds_nothing_wrong(
    environment: Environment, tmp_path: Path
) -> None:
    done = environment.run("mnclglf", "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broken" not in done.stdout
    for extra in ("mnist5k", "dali-cuda13", "faiss-cpu"):
        assert f"remedy: pip install 'mnclglf[{extra}]'" in done.stdout
    assert "a run can be made: mnclglf train --dataset digits --recipe quick" in done.stdout
    assert "loader resident" in done.stdout
    assert str(environment.site) in done.stdout


def test_a_data_set_of_an_extra_names_the_extra(environment: Environment, tmp_path: Path) -> None:
    done = environment.run("mnclglf", "train", "--dataset", "mnist5k", "--recipe", "quick", cwd=tmp_path)
    assert done.returncode != 0
    assert "pip install 'mnclglf[mnist5k]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


OPERATORS = """
import importlib.util, torch
from mnclglf_kernels import NTXentLoss, NearestNeighborQueue, divide
assert not [name for name in ("mnclglf", "numpy", "torchvision") if importlib.util.find_spec(name)]
assert divide(torch.arange(16.0).view(1, 1, 4, 4)).flatten(1).tolist()[3] == [10, 11, 14, 15]
rows = torch.eye(4, requires_grad=True)
NTXentLoss(temperature=0.5)(rows, rows).backward()
assert rows.grad.isfinite().all()
queue = NearestNeighborQueue(size=(8, 4))
queue(rows, update=True)
assert torch.equal(queue(5 * rows), torch.eye(4))
print("all well")
"""


def test_the_operators_alone_need_torch_and_triton_only(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", build_kernels_wheel(tmp_path))
    done = environment.run("python", "-c", OPERATORS, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr
