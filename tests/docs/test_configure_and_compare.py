"""Runs docs/howto/configure-and-compare.md from its top, with tiny runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

import mnclglf
from mnclglf.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "howto" / "configure-and-compare.md").read_text()
BLOCK = re.compile(r"^<!-- tested by: [^\n]* -->\n```(\w+)\n(.*?)^```$", re.M | re.S)
TINY = "image_size: 8\ntrain_images: 128\nwidth: 2\nprojector_width: 16\npredictor_width: 8\nqueue_size: 64\n"
TINY += "batch_size: 64\ndevice: cpu\nprecision: fp32\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb, mlflow and what they import
def test_a_reader_follows_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    kinds: list[str] = []
    for kind, text in BLOCK.findall(PAGE):
        kinds.append(kind)
        if kind == "yaml":
            Path("digits.yaml").write_text(text + TINY)
        elif kind == "python":
            exec(compile(text, "the page", "exec"), names)
        for line in text.splitlines() if kind == "console" else []:
            program, *words = shlex.split(line.removeprefix("$ "))
            assert program == "mnclglf"
            to = Path(words[words.index(">") + 1]) if ">" in words else None
            capsys.readouterr()
            assert main(words[: words.index(">")] if to else words) == 0, line
            if to is not None:
                to.write_text(capsys.readouterr().out)
    assert kinds == ["yaml", "console", "console", "python", "console", "console"]

    settings = {run: json.loads(Path(f"runs/{run}/config.json").read_text()) for run in "abcde"}
    assert {run: of["optim"]["lr"] for run, of in settings.items()} == dict(a=0.05, b=0.1, c=0.05, d=0.05, e=0.2)
    assert {run: of["optim"]["epochs"] for run, of in settings.items()} == dict(a=4, b=4, c=3, d=4, e=4)
    assert settings["d"] == settings["a"] | {"seed": 1}
    listed = json.loads(Path("runs.json").read_text())
    assert [Path(run["run"]).name for run in listed] == ["e", "d", "c", "b", "a"]
    assert [run["state"] for run in listed] == ["finished, 8 steps", "finished, 8 steps", "finished, 6 steps"] + [
        "finished, 8 steps"
    ] * 2
    assert [bool(run["top1"]) for run in listed] == [False, True, False, False, True]
    assert Path("runs/mlflow.db").exists()
    assert isinstance(names["run"], mnclglf.Run)
