"""Runs the notebooks of docs/notebooks as a reader does, in an empty folder, and looks at what they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NAMES = ("first-run", "own-loop", "photographs")
nbformat = pytest.importorskip("nbformat", reason="the extra dev is not installed; `make setup` installs it")


def test_every_notebook_is_named_here_and_on_the_site() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    for page in ("start/index.md", "howto/index.md"):
        linked = re.findall(r"\.\./notebooks/([\w-]+)\.ipynb", (ROOT / "docs" / page).read_text())
        assert set(linked) == set(NAMES), page


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_stores_no_output(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text()
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    assert nbformat.writes(book, version=4) + "\n" == text  # so that a change shows as one
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a notebook in a kernel of this Python, with `folder` as its place, and returns what its cells print."""
    from nbclient import NotebookClient

    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(folder / variable.lower()))
    (folder / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "temporary"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()  # raises with the cell and its error
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.get("name") != "stderr" for output in outputs), outputs
    made = {path.name for path in folder.iterdir()} - {"temporary"}
    assert made <= {"ipythondir", "jupyter_runtime_dir", "jupyter_config_dir", "jupyter_data_dir", "xdg_cache_home"}
    return "\n".join(output.get("text", "") or output["data"].get("text/plain", "") for output in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's packages
def test_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run("first-run", tmp_path, monkeypatch)
    assert "'evaluation.json'" not in printed  # the folder is listed before the evaluation
    assert "'metrics.jsonl'" in printed
    accuracy = {name: float(value) for name, value in re.findall(r"^(\w[\w ]+?) +([\d.]+)%$", printed, re.M)}
    assert accuracy.keys() == {"pretrained", "untrained", "raw pixels"}
    assert all(30 < value <= 100 for value in accuracy.values())  # chance is 10
    assert "torch.Size([1797, 128])" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_own_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run("own-loop", tmp_path, monkeypatch)
    first, last = map(float, re.findall(r"SimCLR: ([\d.]+) to ([\d.]+)", printed)[0])
    assert last < first < 6  # ln 127 = 4.84 says nothing of the images; a random network is near it
    assert "'rows': (512, 64), 'pointer': ()" in printed
    assert "\nTrue\n" in printed
    (same,) = re.findall(r"same class: ([\d.]+)%", printed)
    assert float(same) > 30  # chance is 10
    written = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert [name for name in written if not name.startswith("torchinductor_")] == []  # torch makes that folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run("photographs", tmp_path, monkeypatch)
    assert "JPEG 84, PNG 12, TIFF 1" in printed
    assert "with transparency, which is dropped: 12" in printed
    for encoder in ("pretrained", "untrained"):
        assert re.search(rf"^{encoder} +of 16 validation images: alignment", printed, re.M)
    assert "(97, 128)" in printed
    assert re.search(r"^\['000\.jpg', ", printed, re.M)  # it finds itself first
    (folder,) = (tmp_path / "temporary").glob("mnclglf-*")
    assert {"nearest.html", "photos.npy", "run"} <= {path.name for path in folder.iterdir()}
