"""Tests of `mnclglf export` from its user's side."""

import json
import re
from pathlib import Path

import pytest
from made_runs import make_run

from mnclglf.cli import main
from mnclglf.exporting import formats


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run [a]", method="byol", width=4)[0]


def test_it_says_what_it_wrote_where_and_where_the_weights_load(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out [/bold] ü"
    assert main(["export", str(run), "--out", str(out), "--formats", "pt2", "safetensors", "--head"]) == 0
    printed = capsys.readouterr().out
    for path in out.iterdir():
        assert path.name in printed or path.name == "export.json"
    assert "encoder.safetensors: loads in no model of torchvision and timm" in printed
    assert "width 4" in printed
    assert re.search(r"README\.md: \d+\.\d kB", printed)
    assert str(out) in printed
    assert "README.md" in printed


def test_the_momentum_network_of_a_checkpoint(run: Path) -> None:
    make_run(run, step=8, method="byol", width=4)
    checkpoint = str(run / "checkpoints" / "step-00000004.pt")
    options = ["--network", "momentum", "--checkpoint", checkpoint, "--formats", "safetensors"]
    assert main(["export", str(run), *options]) == 0
    trained = json.loads((run / "export" / "export.json").read_text())["trained"]
    assert (trained["network"], trained["step"]) == ("momentum", 4)


def test_without_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert main(["export", str(run)]) == 0  # no warning either, which would be an error here
    assert "pip install 'mnclglf[export]'" in capsys.readouterr().err
    assert not (run / "export" / "encoder.onnx").exists()
    assert main(["export", str(run), "--formats", "onnx"]) == 2
    assert "pip install 'mnclglf[export]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--out", "taken"], 2, "another --out"),
        (["--checkpoint", "step-9.pt"], 1, "step-9.pt is no file"),
        (["--formats"], 2, "safetensors, onnx, pt2"),
    ],
)
def test_wrong_usage(
    run: Path, options: list[str], code: int, named: str, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken", "mine").touch()
    assert main(["export", str(run), *options]) == code
    assert named in capsys.readouterr().err
    assert not (run / "export").exists()


@pytest.mark.parametrize("option", [["--formats", "torchscript"], ["--network", "teacher"]])
def test_a_choice_that_is_none_exits_with_2(run: Path, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), *option])
    assert stop.value.code == 2
    assert option[1] in capsys.readouterr().err


def test_a_run_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing")]) == 1
    assert "config.json does not exist" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "nothing").exists()
