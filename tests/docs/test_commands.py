"""Every command and every Python block of the documents: run where that is cheap, else checked by its own parser.

A comment directly above a block says why it is not run: `<!-- needs: gpu -->` (see NEEDS). `<!-- tested by: FILE -->`
names the test that takes the code from there.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from mnclglf.cli import main, parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL_PAGES = PAGES
PAGES = [page for page in PAGES if page.parent.name != "lab"]  # dated entries: their commands are of their day
NEEDS = {"gpu", "download", "hours", "slurm", "network", "your-files", "install"}
COMMANDS = {"mnclglf", "make", "python", "pytest", "pip", "apt", "apt-get", "git", "tensorboard", "pre-commit"}
COMMANDS |= {"docker", "torchrun"}
PROGRAMS = {
    "xargs",
    "parallel",
    "sbatch",
    "tensorboard",
    "docker",
    "kubectl",
    "pre-commit",
    "apt",
    "git",
    "pip",
    "source",
}  # only in a block that needs something
TINY = shlex.split(
    "--image-size 8 --train-images 256 --width 2 --projector-width 16 --predictor-width 8 --queue-size 80 "
    "--epochs 1 --batch-size 64 --device cpu --precision fp32"
)
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None
    tested_by: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Returns the commands of a console block, without prompts, comments and output."""
        return [line[2:].split("  #")[0].strip() for line in self.text.splitlines() if line.startswith("$ ")]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        mark = match["mark"] or ""
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start("language")) + 1,
                language=match["language"].strip(),
                text=match["text"],
                needs=mark.removeprefix("needs: ") if mark.startswith("needs: ") else None,
                tested_by=mark.removeprefix("tested by: ") if mark.startswith("tested by: ") else None,
            )
        )
    return found


INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PLACEHOLDER = re.compile(r"\.\.\.|\u2026|<[a-z][a-z _-]*>")  # in `python -m x --stage ...` or `mnclglf knn <run>`


def unpasteable(text: str) -> list[str]:
    """Returns the commands of a page, in blocks or inline, that cannot be pasted: with `...` or `<name>` in them."""
    blocks = [match["text"] for match in BLOCK.finditer(text) if match["language"].strip() != "python"]
    lines = [line for block in blocks for line in block.splitlines()] + INLINE.findall(BLOCK.sub("", text))
    commands = [line[2:] for line in lines if line.startswith("$ ")]
    # `mnclglf on mnist5k: ...` is what a run prints.
    commands += [line for line in lines if line.split(" ")[0] in COMMANDS and not line.startswith("mnclglf on ")]
    return [command for command in commands if PLACEHOLDER.search(command.split("  #")[0])]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CONSOLE = [block for block in BLOCKS if block.language == "console" and block.tested_by is None]
PYTHON = [block for block in BLOCKS if block.language == "python"]
RUN_PAGES = [
    ROOT / "README.md",
    ROOT / "docs/start/index.md",
    ROOT / "docs/howto/use-the-encoder.md",
    ROOT / "docs/howto/embed-a-folder.md",
    ROOT / "docs/howto/export-the-encoder.md",
    ROOT / "docs/howto/other-encoders.md",
    ROOT / "docs/howto/judge-an-encoder.md",
]


def parts_of(command: str) -> list[list[str]]:
    """Returns the words of each program in a line of shell: split at | && ; and without redirections and variables."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    programs: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word in ("|", "&&", ";", "||", "&"):
            programs.append([])
        elif word in (">", "<", ">>"):
            next(words)
        elif programs[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            programs[-1].append(word)
    return [program for program in programs if program]


def check(program: list[str], needs: str | None) -> None:
    """Raises or fails unless the program takes these arguments."""
    name, *arguments = program
    if name == "mnclglf":
        parse(arguments)
    elif name == "make":
        check_make(arguments)
    elif name in ("python", "python3.11") and arguments[0] == "-m":
        module, *options = arguments[1:]
        if module == "pytest":
            check_paths(options)
        else:
            assert find_spec(module), f"there is no module {module}"
            text = help_of_module(module)
            for option in options:
                if option.startswith("--"):
                    assert option.split("=")[0] in text, f"{module} has no option {option}"
    elif name in ("python", "pytest"):
        check_paths(arguments)
    elif name == "torchrun":
        parse(arguments[arguments.index("mnclglf") + 1 :])
        assert needs, "torchrun is not run here; say above the block what it needs"
    else:
        assert name in PROGRAMS, f"{name} is neither checked nor known here"
        assert needs, f"{name} is not run here; say above the block what it needs, as <!-- needs: network -->"
        if name == "docker":
            check_docker(arguments)
        check_paths([word for word in arguments if word.startswith(("docs/", "bench/", "tests/"))])


def check_docker(arguments: list[str]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for option, value in pairwise(arguments):
        if option == "--build-arg":
            assert re.search(rf"^ARG {value.split('=')[0]}=", dockerfile, re.M), f"the Dockerfile has no ARG {value}"
    if arguments[0] == "run":
        (image,) = (place for place, word in enumerate(arguments) if word in ("mnclglf", "mnclglf:cpu"))
        parse(arguments[image + 1 :] or ["doctor"])


def check_paths(arguments: list[str]) -> None:
    for word in arguments:
        if "/" in word and not word.startswith(("-", "runs/")):
            assert (ROOT / word.split("::")[0]).exists(), f"there is no {word}"


def check_make(arguments: list[str]) -> None:
    variables = [word.split("=")[0] for word in arguments if "=" in word]
    makefile = (ROOT / "Makefile").read_text()
    for variable in variables:
        assert re.search(rf"^{variable} \?=", makefile, re.M), f"the Makefile has no variable {variable}"
    environment = {"PATH": os.environ["PATH"]}  # without the variables of a `make test` that runs this
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith(".venv/bin/mnclglf "):
            parse(shlex.split(line)[1:])


@cache
def help_of_module(module: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    assert page.read_text().count("\n```") % 2 == 0, f"{page}: a fence is not closed"
    for block in blocks_of(page):
        assert block.needs is None or block.needs in NEEDS, f"{block.name}: needs {block.needs}; one of {NEEDS}"
        if block.tested_by is not None:
            assert page.name in (ROOT / block.tested_by).read_text(), (
                f"{block.name}: {block.tested_by} takes no code from it"
            )
        if block.language not in ("console", "python") and not block.language.startswith("{"):
            first = {line.removeprefix("$ ").split(" ")[0] for line in block.text.splitlines()}
            assert not first & COMMANDS, f"{block.name}: commands stand in a console block, each after '$ '"
        elif block.language == "console":
            assert block.commands, f"{block.name}: no command after a '$ '"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_pasted(page: Path) -> None:
    assert unpasteable(page.read_text()) == []


def test_a_command_with_a_gap_is_found() -> None:
    text = """
`mnclglf on mnist5k: 4,000 images ...` is output, `...` a word, and `python -m bench.gpu_day --stage ...` a gap.

```console
$ mnclglf train --method simsiam ...
$ FOO=1 make train DATASET=<name>
$ mnclglf knn runs/x > plan.txt  # and so on ...
step 1 ...
```

```python
x[...] = 1
```

```bash
make bench \u2026
```
"""
    assert unpasteable(text) == [
        "mnclglf train --method simsiam ...",
        "FOO=1 make train DATASET=<name>",
        "make bench \u2026",
        "python -m bench.gpu_day --stage ...",
    ]


def is_slow(block: Block) -> bool:
    return any(word in block.text for word in ("python -m bench", "python -m mnclglf_kernels"))


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=b.name, marks=[pytest.mark.slow] if is_slow(b) else []) for b in CONSOLE],
)
def test_commands_are_taken_by_their_parsers(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in block.commands:
        try:
            for program in parts_of(command):
                check(program, block.needs)
        except SystemExit as stop:
            if stop.code not in (0, None):
                pytest.fail(f"{block.name}: {command} is refused")


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in PYTHON])
def test_python_names_what_there_is(block: Block) -> None:
    if block.tested_by is not None:
        return
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mnclglf"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), f"{block.name}: {node.module} has no {name.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mnclglf":
            assert hasattr(importlib.import_module("mnclglf"), node.attr), f"{block.name}: no mnclglf.{node.attr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_reader_follows_the_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Runs the page from its top in an empty folder; only sizes are made tiny, and the images those that are here.
    monkeypatch.chdir(tmp_path)
    make_tiny(monkeypatch)
    shown = [block for block in blocks_of(page) if not block.needs and not block.tested_by]
    shutil.copy(ROOT / "docs" / "images" / "folder-views.png", "photo.png")  # the reader's picture file
    for name in ("cats/1.png", "dogs/2.png", "dogs/3.png"):  # the reader's folder
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docs" / "images" / "folder-views.png", tmp_path / "photos" / name)
    names: dict[str, object] = {}
    ran = 0
    for block in shown:
        if block.language == "python":
            exec(compile(block.text, block.name, "exec"), names)
            ran += 1
        elif block.language == "console":
            for program in (program for command in block.commands for program in parts_of(command)):
                if program[0] == "mnclglf" and "reproduce" not in program:
                    assert main(tiny(program[1:])) == 0, f"{block.name}: {program}"
                    ran += 1
    assert ran > 0, f"{page} runs nothing"


def tiny(arguments: list[str]) -> list[str]:
    """Returns the arguments with tiny sizes where they train."""
    kept = [word for word in arguments if word != "paper"]
    if kept[0] != "train" or "--print-config" in kept:
        return arguments
    if any(word.startswith("timm:") for word in arguments):  # it has no width, and the page gives a size that it takes
        return [*arguments, *TINY[2:4], *TINY[6:]]
    return [*arguments, *TINY, *(["--epochs", "2"] if "--extend" in arguments else [])]


def make_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the recipe `quick` tiny, so that `mnclglf.train(recipe="quick")` takes a moment."""
    from dataclasses import replace

    from mnclglf import recipes

    whole = recipes.RECIPES["quick"]

    def small(method, dataset):
        config = whole(method, dataset)
        return replace(
            config,
            data=replace(config.data, image_size=8, train_images=256),
            model=replace(config.model, width=2, projector_width=16, predictor_width=8),
            objective=replace(config.objective, queue_size=80),
            optim=replace(
                config.optim, batch_size=64, epochs=2, warmup_epochs=0.0, lr=0.02
            ),  # at 0.1 ResNet-34 diverges
        )

    monkeypatch.setitem(recipes.RECIPES, "quick", small)
