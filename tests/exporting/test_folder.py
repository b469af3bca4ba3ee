"""Tests of the place of an export: whole or not at all, and nothing that is not ours is replaced."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from killed_export import writer
from made_runs import make_run

import mnclglf
import mnclglf.api
from mnclglf.exporting import write
from mnclglf.exporting.folder import make_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", method="simclr")[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder, by its path, and every folder as nothing."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def export(run: Path, out: Path | None = None, formats: tuple[str, ...] = ("safetensors",), head: bool = False) -> Path:
    return mnclglf.export(run, out, formats=formats, head=head)


def test_the_default_place_is_the_run_and_checksums_are_those_of_the_files(run: Path) -> None:
    folder = export(run)
    assert folder == run.resolve() / "export"
    files = json.loads((folder / "export.json").read_text())["files"]
    assert set(files) == {"encoder.safetensors", "README.md"}
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in files.items())
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask  # readable as the run is, unlike a temporary folder


def test_one_format_may_be_named_without_a_list(run: Path) -> None:
    assert (mnclglf.export(run, formats="safetensors") / "encoder.safetensors").is_file()


def test_a_second_export_replaces_the_first(run: Path) -> None:
    before = set(contents(export(run, formats=("safetensors", "pt2"))))
    folder = export(run, head=True)
    assert before == {"encoder.safetensors", "encoder.pt2", "README.md", "export.json"}
    assert set(contents(folder)) == {"encoder.safetensors", "heads.safetensors", "README.md", "export.json"}
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json", "export"]


@pytest.mark.parametrize("name", ["a [b] {c}", "ü 图", "x" * 255, "a\nb", "sub/folders/of it"])
def test_any_name_will_do(run: Path, tmp_path: Path, name: str) -> None:
    folder = export(run, tmp_path / name)
    assert folder == (tmp_path / name).resolve()
    assert (folder / "encoder.safetensors").is_file()
    assert export(run, tmp_path / name) == folder


def test_an_empty_folder_is_filled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "README.md" in contents(export(run, tmp_path / "empty"))


def test_a_link_to_an_export_stays_a_link(run: Path, tmp_path: Path) -> None:
    target = export(run, tmp_path / "target")
    (tmp_path / "link").symlink_to(target)
    assert export(run, tmp_path / "link", head=True) == target
    assert (tmp_path / "link").is_symlink()
    assert (target / "heads.safetensors").exists()


@pytest.mark.parametrize("kind", ["foreign", "the run", "file", "json of another", "damaged json", "no list"])
def test_what_is_no_export_stays_as_it_is(run: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "the run":
        place = run
    elif kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
        for name, text in {
            "json of another": '{"kind": "other", "files": {"thesis.tex": {}}}',
            "damaged json": '{"kind": "mnclglf export", ',
            "no list": '{"kind": "mnclglf export", "files": ["thesis.tex"]}',
        }.items():
            if kind == name:
                (place / "export.json").write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="another --out"):
        export(run, place)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("added", ["notes.txt", ".hidden", "folder/inner"])
def test_a_file_that_was_added_is_named_and_stays(run: Path, added: str) -> None:
    folder = export(run)
    (folder / added).parent.mkdir(exist_ok=True)
    (folder / added).write_text("mine")
    before = contents(run)
    with pytest.raises(ValueError, match=rf"'{added.split('/')[0]}'.*another --out"):
        export(run)
    assert contents(run) == before


def test_a_card_that_was_completed_is_named_and_stays(run: Path) -> None:
    card = export(run) / "README.md"
    card.write_text(card.read_text() + "\nLicense: mine\n")
    before = contents(run)
    with pytest.raises(ValueError, match=r"README\.md was changed.*move it away"):
        export(run)
    assert contents(run) == before
    card.unlink()
    assert export(run, head=True) == card.parent


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_an_interrupted_export_leaves_the_one_before(run: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run)
    before = contents(run)
    if when == "writing":
        monkeypatch.setattr(write, "model_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        rename = Path.rename

        def interrupted(self: Path, target: Path) -> Path:
            if self.suffix == ".tmp":
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, head=True)
    assert contents(run) == before


def test_a_file_that_appears_during_the_export_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(run)
    card = write.model_card

    def with_a_visitor(*arguments):
        (folder / "notes.txt").write_text("mine")
        return card(*arguments)

    monkeypatch.setattr(write, "model_card", with_a_visitor)
    with pytest.raises(ValueError, match=r"'notes\.txt'"):
        export(run, head=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "heads.safetensors").exists()


def test_a_place_that_cannot_be_written_is_named_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnclglf.api, "load_state", None)  # any work would fail
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"another --out.*file"):
        export(run, tmp_path / "file" / "export")


def test_what_a_killed_export_left_is_put_back_or_cleared_by_the_next(tmp_path: Path) -> None:
    code = f"from killed_export import *; check_every_kill(Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    checked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_what_another_export_writes_and_what_only_has_such_a_name_stay(tmp_path: Path) -> None:
    (tmp_path / ".export-mine.tmp").mkdir()
    (tmp_path / ".export-1-0123abcd.tmp").write_text("mine")

    def write(made: Path) -> dict[str, Any]:
        make_folder(tmp_path / "inner", writer("inner"))  # another export beside this one, which is not done
        return writer("outer")(made)

    make_folder(tmp_path / "outer", write)
    assert (tmp_path / "outer" / "README.md").read_text() == "outer"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".export-1-0123abcd.tmp",
        ".export-mine.tmp",
        "inner",
        "outer",
    ]
