"""The code of docs/howto/any-dataset.md, run in order on a small stand-in for the reader's photographs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.image_folder import pixels, write

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "any-dataset.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part, count in (("train", 12), ("val", 6)):
        for name in ("cats", "dogs"):
            for number in range(count):
                write(Path("photos", part, name, f"{number}.png"), pixels(40 + number, 36, number))
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 2
    assert [result.top1 for result in names["again"]] == [result.top1 for result in names["results"]]
    assert len(list(Path("runs/objects/checkpoints").glob("*.pt"))) == 1  # the second call resumed at the end
