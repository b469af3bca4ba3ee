"""What a project writes holds no environment variable, no secret of an address and no path of the home or of Python.

The commands run as a process of their own whose environment has marked values. Then every byte of every file is
searched, also of the members of zip files and of what is compressed.
"""

import gzip
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from image_folder import lay_out, pixels
from shards import write_shards

ROOT = Path(__file__).resolve().parents[1]
SECRET, HOME, USER = "s3cr3tmark", "h0memark", "us3rmark"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")


def contents(data: bytes, name: str) -> list[tuple[str, bytes]]:
    """Returns the name and the bytes of a file, and of everything that is packed in it."""
    found = [(name, data)]
    if data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                found += contents(archive.read(member), f"{name}:{member}")
    elif data[:2] == b"\x1f\x8b":
        found += contents(gzip.decompress(data), f"{name}:gzip")
    return found


def found_in(folder: Path, marks: dict[str, bytes]) -> list[str]:
    """Returns each file, or member of one, below a folder whose name or bytes have a mark."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    parts = [part for path in files for part in contents(path.read_bytes(), str(path.relative_to(folder)))]
    return [f"{what}: {name}" for name, data in parts for what, mark in marks.items() if mark in name.encode() + data]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a home with the folder project, runs the commands in it, and returns it."""
    home = tmp_path_factory.mktemp("place") / HOME
    project = home / "project"
    lay_out(
        project / "photos",
        *(f"{split}/{name}/{n}.png" for split in ("train", "val") for name in "ab" for n in range(12)),
    )
    write_shards(project / "shards", [pixels(16, 16, seed=n) for n in range(24)], [n % 2 for n in range(24)], each=24)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPLCONFIG"))}
    environment |= dict.fromkeys(SECRETS, SECRET)
    environment |= {"HOME": str(home), "USER": USER, "LOGNAME": USER, "OMP_NUM_THREADS": "1"}
    program = ROOT / "tests/helpers/private_commands.py"
    command = [sys.executable, str(program), f"?X-Amz-Signature={SECRET}&X-Amz-Expires=600"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (home / "output.txt").write_text(done.stdout + done.stderr)
    return home


@pytest.mark.slow
def test_no_file_holds_a_secret(home: Path) -> None:
    assert found_in(home, {"secret": SECRET.encode()}) == []  # also of the caches in the home, and of what was printed


@pytest.mark.slow
def test_no_file_of_the_project_holds_a_path_or_a_name_of_this_machine(home: Path) -> None:
    marks = {"home": HOME, "user": USER, "this package": str(ROOT), "Python": sys.prefix}
    assert len([*(home / "project" / "runs").rglob("*")]) > 60
    found = found_in(home / "project", {what: mark.encode() for what, mark in marks.items()})
    assert [text for text in found if text != "home: runs/mlflow.db"] == []  # MLflow's own store; SECURITY.md names it


def test_search_finds_what_is_packed(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", gzip.compress(b"a mark"))
    (tmp_path / "one.zip").write_bytes(packed.getvalue())
    (tmp_path / "mark.txt").write_text("nothing")
    assert found_in(tmp_path, {"it": b"mark"}) == ["it: mark.txt", "it: one.zip:inner:gzip"]
