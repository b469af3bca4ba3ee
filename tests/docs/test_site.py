"""The site: links of the pages outside it, inventories, the generated parts, and the build itself."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest

from mnclglf.config import WRITTEN, RunConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
pytest.importorskip("sphinx", reason="the extra docs is not installed; `make setup` installs it")


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def anchor(heading: str) -> str:
    """Returns the anchor that GitHub and MyST give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_pages_outside_the_site_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / name).read_text())
    for link in links:
        path, _, part = link.partition("#")
        target = ROOT / (path or name)
        assert target.exists(), f"{name} links to {link}, which is not there"
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert part in {anchor(heading) for heading in headings}, f"{name} links to {link}: no such heading"


def test_inventories_are_what_their_script_writes(tmp_path: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    load(DOCS / "inventories" / "write.py").write(tmp_path)
    written = sorted(tmp_path.glob("*.inv"))
    assert [path.name for path in written] == [path.name for path in sorted((DOCS / "inventories").glob("*.inv"))]
    for path in written:
        kept = InventoryFile.loads((DOCS / "inventories" / path.name).read_bytes(), uri="")
        assert kept.data == InventoryFile.loads(path.read_bytes(), uri="").data, f"{path.name}: run write.py again"


def test_the_page_of_settings_has_each_setting_with_its_meaning() -> None:
    text = load(DOCS / "generate.py").settings()
    for field in fields(RunConfig):
        section = field.default_factory
        names = [f.name for f in fields(section)] if is_dataclass(section) else [field.name]
        for name in [name for name in names if name not in WRITTEN]:
            row = re.search(rf"^\| `--{name.rstrip('_').replace('_', '-')}` \| `[^`]*` \| (.*) \|$", text, re.M)
            assert row, f"{name} is not on the page of settings"


def test_the_page_of_commands_has_each_command() -> None:
    from mnclglf.cli import main

    text = load(DOCS / "generate.py").command_line()
    for name in ("train", "knn", "linear", "finetune", "quality", "report", "data inspect", "data views", "reproduce"):
        assert f"## mnclglf {name}\n" in text
    assert "--vote-temperature" in text
    with pytest.raises(SystemExit):
        main(["--help"])


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html", DOCS, tmp_path / "site"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--queue-size" in (tmp_path / "site" / "reference" / "settings.html").read_text()


@pytest.mark.slow
def test_build_fails_on_a_broken_link_and_an_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text((DOCS / "conf.py").read_text().replace("__file__", repr(str(DOCS / "conf.py"))))
    (tmp_path / "inventories").symlink_to(DOCS / "inventories")
    (tmp_path / "index.md").write_text("# Page\n\n[gone](gone.md) and {py:class}`mnclglf.Gone`\n")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html", tmp_path, tmp_path / "o"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "gone.md" in done.stderr
    assert "mnclglf.Gone" in done.stderr
