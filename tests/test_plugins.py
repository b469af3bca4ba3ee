"""Methods and sources of other packages: a package is written into a temporary folder, with its dist-info."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import mnclglf
from mnclglf.data.sources import Source
from mnclglf.methods import method_of
from mnclglf.methods.base import Losses, Method
from mnclglf.plugins import PluginError, class_name, load_class
from mnclglf.runs.files import read_config

ROOT = Path(__file__).resolve().parents[1]
CODE = '''
import numpy as np

from mnclglf.data.images import ImageArray
from mnclglf.data.sources.source import Request, Source
from mnclglf.methods.simsiam import SimSiam


class Mine(SimSiam):
    """A method of this package."""


class Stripes(Source):
    """Two classes of stripes."""

    name = "stripes"
    class_count = 2
    needs_files = False

    def load(self, request: Request) -> tuple[ImageArray, ImageArray]:
        images = np.zeros((96, 16, 16, 3), np.uint8)
        images[::2, ::2] = 200
        images[1::2, :, ::2] = 200
        images += np.random.default_rng(0).integers(0, 50, images.shape, dtype=np.uint8)
        whole = ImageArray(
            name=self.name, split="train", images=images, labels=np.arange(96) % 2, classes=("flat", "steep")
        )
        return whole.subset(range(64)), whole.subset(range(64, 96))
'''
ENTRIES = """\
[mnclglf.methods]
mypkg_method = mypkg.parts:Mine
absent = mypkg.nowhere:Mine
wrong = mypkg.parts:Stripes

[mnclglf.sources]
stripes = mypkg.parts:Stripes
other_name = mypkg.parts:Stripes
"""
SMALL = [
    "--recipe",
    "quick",
    "--batch-size",
    "16",
    "--width",
    "2",
    "--projector-width",
    "8",
    "--predictor-width",
    "4",
    "--device",
    "cpu",
    "--epochs",
    "1",
]


def write_package(folder: Path, entries: str = ENTRIES) -> Path:
    (folder / "mypkg").mkdir(parents=True)
    (folder / "mypkg" / "__init__.py").touch()
    (folder / "mypkg" / "parts.py").write_text(dedent(CODE))
    info = folder / "mypkg-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypkg\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(entries)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("site"))


def command(*words: str, site: Path | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `mnclglf`; the package is installed where `site` is given."""
    path = [str(ROOT), str(ROOT / "kernels"), *([] if site is None else [str(site)])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "XDG_CACHE_HOME": str(cwd / "cache")}
    environment |= {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "mnclglf", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_package_trains_resumes_and_evaluates_by_the_command_line(site: Path, tmp_path: Path) -> None:
    help_text = command("train", "--help", site=site, cwd=tmp_path).stdout
    assert "mypkg_method" in help_text
    assert "stripes" in help_text
    options = ["--method", "mypkg_method", "--dataset", "stripes", "--out", "run", *SMALL]
    trained = command("train", *options, site=site, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["method"], config["dataset"]) == ("mypkg_method", "stripes")
    newest = tmp_path / "run" / "checkpoints" / "step-00000004.pt"
    assert newest.exists()
    resumed = command("train", *options[:4], *SMALL, "--out", "again", "--resume", str(newest), site=site, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    knn = command("knn", "run", "--neighbors", "5", "--no-raw-pixels", "--device", "cpu", site=site, cwd=tmp_path)
    assert knn.returncode == 0, knn.stderr
    embedded = command("embed", "run", "stripes", "--device", "cpu", site=site, cwd=tmp_path)
    assert "stripes.npy: 96 rows" in embedded.stdout, embedded.stderr
    # Without the package each says what is missing.
    for words in (["knn", "run"], ["train", *options]):
        without = command(*words, site=None, cwd=tmp_path)
        assert without.returncode in (1, 2)
        assert "mypkg_method" in without.stderr
    assert (
        "entry point of mnclglf.methods, install that package" in command("knn", "run", site=None, cwd=tmp_path).stderr
    )
    lost = command("train", "--dataset", "stripes", site=None, cwd=tmp_path)
    assert lost.returncode == 2
    assert "install the package that gives it if it is an entry point of mnclglf.sources" in lost.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "absent"], "'absent', mypkg.nowhere:Mine of mypkg 1.2, cannot be imported"),
        (["--method", "wrong"], "'wrong' is Stripes, no subclass of mnclglf.methods.base.Method"),
        (["--dataset", "other_name"], "entry point 'other_name' has the name 'stripes'; give both the same"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_named(
    options: list[str], named: str, site: Path, tmp_path: Path
) -> None:
    result = command("train", *options, site=site, cwd=tmp_path)
    assert result.returncode == 2
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_two_packages_of_one_name_are_named(tmp_path: Path) -> None:
    site = write_package(tmp_path / "site")
    other = site / "other-3.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 3\n")
    (other / "entry_points.txt").write_text("[mnclglf.methods]\nmypkg_method = mypkg.parts:Mine2\n")
    result = command("train", "--method", "mypkg_method", "--dataset", "stripes", site=site, cwd=tmp_path)
    assert result.returncode == 2
    assert "twice" in result.stderr
    assert "mypkg 1.2" in result.stderr
    assert "other 3" in result.stderr


@pytest.mark.slow
def test_classes_of_a_module_are_passed_and_found_again(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site))
    from mypkg.parts import (  # pyright: ignore[reportMissingImports]
        Mine,  # pyright: ignore[reportUnknownVariableType]
        Stripes,  # pyright: ignore[reportUnknownVariableType]
    )

    settings: dict[str, Any] = dict(
        recipe="quick", batch_size=16, width=2, projector_width=8, predictor_width=4, device="cpu", epochs=1
    )
    monkeypatch.chdir(tmp_path)
    run = mnclglf.train(method=Mine, dataset=Stripes, **settings)
    assert run.path == Path("runs/Mine-Stripes-quick-seed0")
    config = read_config(run.path)
    assert (config.method, config.dataset) == ("mypkg.parts:Mine", "mypkg.parts:Stripes")
    assert len(mnclglf.evaluate(run, "knn", neighbors=5, raw_pixels=False, device="cpu")) == 2
    assert command("knn", str(run.path), "--neighbors", "5", site=site, cwd=tmp_path).returncode == 0
    without = command("knn", str(run.path), "--neighbors", "5", site=None, cwd=tmp_path)
    assert without.returncode == 1
    assert "'mypkg.parts:Stripes' cannot be imported (No module named 'mypkg')" in without.stderr
    assert "Python path" in without.stderr


class Half(Method):
    """A method without a forward."""

    def build(self, model: Any, queue_dtype: Any) -> None: ...


def inside() -> type[Method]:
    class Hidden(Half):
        def forward(self, views: Any, labels: Any = None) -> Losses:
            raise NotImplementedError

    return Hidden


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: mnclglf.train(method=Half, dataset="digits"), "Half' lacks forward of Method"),
        (lambda: mnclglf.train(method=inside()), "Hidden of .* is defined within a function.*top of a module"),
        (lambda: mnclglf.train(method=dict), "'builtins:dict' is dict, no subclass of mnclglf.methods.base.Method"),
        (lambda: load_class("__main__:Nothing"), "no Nothing here; it was defined in a script"),
        (lambda: method_of("mnclglf.methods.simsiam:Absent"), "no Absent here; .*Python path"),
        (lambda: mnclglf.train(dataset=Source), "lacks load of Source"),
    ],
    ids=["abstract", "local", "other", "script", "absent", "source"],
)
def test_a_class_that_cannot_be_used_is_refused(call: Callable[[], object], named: str) -> None:
    with pytest.raises(PluginError, match=named):
        call()


def test_a_class_has_the_name_of_its_module() -> None:
    assert class_name(Half) == f"{__name__}:Half"
    assert load_class(class_name(Half)) is Half
