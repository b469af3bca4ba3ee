"""A copy of the tree in which a how-to page is followed word for word, and nothing else is changed.

A page's instructions are fenced code blocks; the paragraph before a block says what to do with it and ends in one of

    Write `FILE`:                   the block is the whole of a new file
    Add to `NAME` in `FILE`:        the block's lines go to the end of the table or class NAME
    After `LINE` in `FILE`:         the block goes after the one line that reads LINE, indentation apart
    At the end of `FILE`:           the block is appended

A comment line of the page may stand between. Import statements at the start of a block go among the file's own, in
their sorted place. The block's lines are indented as they stand in the page. A `python` block without such a paragraph
is an error: an illustration is a `py` block. Commands are the lines of `bash` blocks and, after `$ `, of `console`
blocks.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TREE = Path(__file__).resolve().parents[2]
MADE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.pt")
MADE_AT_ROOT = shutil.ignore_patterns("shared", "runs", "reproduced", "data-*", "build", "dist")
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"^<!--.*?-->$", flags=re.MULTILINE)
FILE = r"`(?P<file>[\w./-]+\.\w+)`:$"
FORMS = {
    "write": re.compile(rf"[Ww]rite {FILE}"),
    "table": re.compile(rf"[Aa]dd to `(?P<place>\w+)` in {FILE}"),
    "after": re.compile(rf"[Aa]fter `(?P<place>[^`]+)` in {FILE}"),
    "end": re.compile(rf"[Aa]t the end of {FILE}"),
}


class Edit(NamedTuple):
    """One instruction of a page."""

    form: str  # a key of FORMS
    file: str  # relative to the tree
    place: str  # the table's name or the anchor line; "" for the other forms
    code: str


def edits_of(page: str) -> list[Edit]:
    """Returns the instructions of a page's text, in order.

    Raises:
        ValueError: a `python` block has no instruction.
    """
    found: list[Edit] = []
    for fence in FENCE.finditer(page):
        before = COMMENT.sub("", page[: fence.start()]).rstrip().rpartition("\n\n")[2]
        paragraph = " ".join(before.split())
        matches = [(form, match) for form, pattern in FORMS.items() if (match := pattern.search(paragraph))]
        if matches:
            form, match = matches[0]
            found.append(Edit(form, match["file"], match.groupdict().get("place", ""), fence["code"]))
        elif fence["language"] == "python":
            raise ValueError(f"what is to be done with this block? {paragraph!r} says none of {', '.join(FORMS)}")
    return found


def commands_of(page: str) -> list[str]:
    """The commands of a page's `console` blocks (lines after `$ `) and `bash` blocks (all lines), comments removed."""
    lines: list[str] = []
    for fence in FENCE.finditer(page):
        own = fence["code"].replace("\\\n", " ").splitlines()
        if fence["language"] == "console":
            lines += [line[2:] for line in own if line.startswith("$ ")]
        elif fence["language"] == "bash":
            lines += own
    commands = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [command for command in commands if command]


@dataclass(frozen=True)
class TreeCopy:
    """A copy of the tree, and the operations on it."""

    root: Path

    def follow(self, page: str) -> list[str]:
        """Applies every instruction of the page at this path; returns the files written, in order, each once."""
        edits = edits_of((self.root / page).read_text())
        for edit in edits:
            self.apply(edit)
        return list(dict.fromkeys(edit.file for edit in edits))

    def apply(self, edit: Edit) -> None:
        """Applies one instruction.

        Raises:
            ValueError: the file exists already, or the place is not in it exactly once.
        """
        path = self.root / edit.file
        if edit.form == "write":
            if path.exists():
                raise ValueError(f"{edit.file} is there already, and the page says to write it")
            path.write_text(edit.code)
            return
        imports, code = split_imports(edit.code) if path.suffix == ".py" else ("", edit.code)
        lines = path.read_text().splitlines(keepends=True)
        if edit.form == "end":
            place = len(lines)
        elif edit.form == "table":
            place = end_of_table("".join(lines), edit.place, edit.file)
        else:
            place = 1 + line_of(lines, edit.place, edit.file)
        lines.insert(place, code)
        path.write_text(with_imports("".join(lines), imports))

    def environment(self) -> dict[str, str]:
        """Returns this process's environment with the copy's code first, its own cache, and no Triton interpreter."""
        own = {"PYTHONPATH": f"{self.root}:{self.root / 'kernels'}", "XDG_CACHE_HOME": str(self.root / ".cache")}
        return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | own

    def python(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs Python in the copy; unless `check` is off, a nonzero exit code fails with the output."""
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if check:
            assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
        return result

    def command(self, line: str) -> subprocess.CompletedProcess[str]:
        """Runs a line of a page: `mnclglf ...`, `pytest ...` or `basedpyright ...`."""
        program, *arguments = shlex.split(line)
        if program == "pytest":
            return self.pytest(*arguments)
        return self.python("-m", program, *arguments)

    def mnclglf(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line of the copy."""
        return self.python("-m", "mnclglf", *arguments)

    def pytest(self, *selection: str) -> subprocess.CompletedProcess[str]:
        """Runs tests of the copy, in one process; a selection of no tests fails, as a failing test does."""
        return self.python("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *selection)

    def types(self, *files: str) -> subprocess.CompletedProcess[str]:
        """Checks the types of files of the copy with its pyproject.toml."""
        return self.python("-m", "basedpyright", "--pythonpath", sys.executable, *files)


def copy_tree(destination: Path) -> TreeCopy:
    """Copies the tree, without what is made from it, into the new folder `destination`."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        made = MADE(folder, names)
        return made | MADE_AT_ROOT(folder, names) if Path(folder) == TREE else made

    shutil.copytree(TREE, destination, ignore=left_out)
    return TreeCopy(destination)


def split_imports(code: str) -> tuple[str, str]:
    """Splits a block into its first import statements and the rest, without the blank lines between."""
    lines = code.splitlines(keepends=True)
    count = 0
    while count < len(lines) and (lines[count].startswith(("import ", "from ")) or not lines[count].strip()):
        count += 1
    imports = "".join(line for line in lines[:count] if line.strip())
    return (imports, "".join(lines[count:])) if imports else ("", code)


def with_imports(source: str, imports: str) -> str:
    """Returns the source with these one-line imports added, each after the last import that sorts before it."""
    lines = source.splitlines(keepends=True)
    for new in imports.splitlines(keepends=True):
        own = [node for node in ast.parse("".join(lines)).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        before = [node for node in own if lines[node.lineno - 1] < new or "__future__" in lines[node.lineno - 1]]
        place = before[-1].end_lineno if before else own[0].lineno - 1 if own else 0
        assert place is not None
        lines.insert(place, new)
    return "".join(lines)


def end_of_table(source: str, name: str, file: str) -> int:
    """Returns the index of the line before which a row of the table or a line of the class `name` is added."""
    found: list[int] = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert node.end_lineno is not None
            found.append(node.end_lineno - 1)
        elif isinstance(node, ast.ClassDef) and node.name == name:
            assert node.end_lineno is not None
            found.append(node.end_lineno)
    if len(found) != 1:
        raise ValueError(f"{name} is {len(found)} times in {file}, and the page says to add to it")
    return found[0]


def line_of(lines: list[str], anchor: str, file: str) -> int:
    """Returns the index of the only line that reads `anchor`, ignoring indentation."""
    found = [index for index, line in enumerate(lines) if line.strip() == anchor.strip()]
    if len(found) != 1:
        raise ValueError(f"the line {anchor!r} is {len(found)} times in {file}, and the page says to write after it")
    return found[0]
