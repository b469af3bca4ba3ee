"""The helper that follows a how-to page in a copy of the tree."""

from pathlib import Path

import pytest
from tree_copy import Edit, TreeCopy, commands_of, copy_tree, edits_of

PAGE = """
Write `pack/new.py`:

```python
x = 1
```

A row. Add to
`TABLE` in `pack/table.py`:

```python
from pack.new import x

    "x": x,
```

After `import os` in `pack/table.py`:

```python
NAME = "table"
```

At the end of `pack/table.py`:

```python
last = True
```

An illustration:

```py
unused = 0
```

```bash
mnclglf knn runs/x \\
    --k 20  # neighbors
```
"""
TABLE = """import os
import sys

TABLE: dict[str, int] = {
    "a": 1,
}


class Kept:
    a: int
"""


@pytest.fixture
def copy(tmp_path: Path) -> TreeCopy:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "table.py").write_text(TABLE)
    (tmp_path / "page.md").write_text(PAGE)
    return TreeCopy(tmp_path)


def test_each_form_of_instruction_is_followed(copy: TreeCopy) -> None:
    assert copy.follow("page.md") == ["pack/new.py", "pack/table.py"]
    assert (copy.root / "pack" / "new.py").read_text() == "x = 1\n"
    table = (copy.root / "pack" / "table.py").read_text()
    assert table.splitlines()[:4] == ["from pack.new import x", "import os", 'NAME = "table"', "import sys"]
    assert table.endswith("    a: int\nlast = True\n")
    values: dict[str, object] = {}
    exec(compile(table.replace("from pack.new import x", "x = 1"), "table.py", "exec"), values)
    assert (values["TABLE"], values["NAME"], values["last"]) == ({"a": 1, "x": 1}, "table", True)


def test_a_field_is_added_to_a_class(copy: TreeCopy) -> None:
    copy.apply(Edit("table", "pack/table.py", "Kept", "    b: int\n"))
    assert (copy.root / "pack" / "table.py").read_text() == TABLE + "    b: int\n"


def test_commands_are_the_lines_of_bash_blocks() -> None:
    assert commands_of(PAGE) == ["mnclglf knn runs/x --k 20"]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (Edit("write", "pack/table.py", "", ""), "pack/table.py is there already"),
        (Edit("table", "pack/table.py", "ROWS", ""), "ROWS is 0 times in pack/table.py"),
        (Edit("after", "pack/table.py", "}, {", ""), "'}, {' is 0 times in pack/table.py"),
    ],
)
def test_a_page_that_does_not_fit_the_tree_is_named(copy: TreeCopy, edit: Edit, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        copy.apply(edit)


def test_a_block_without_an_instruction_is_an_error() -> None:
    with pytest.raises(ValueError, match="'Now this:' says none of write, table, after, end"):
        edits_of("Now this:\n\n```python\nx = 1\n```\n")


def test_the_copy_runs_its_own_code(tmp_path: Path) -> None:
    copy = copy_tree(tmp_path / "copy")
    (copy.root / "mnclglf" / "mark.py").write_text("MARK = 7\n")
    assert copy.python("-c", "import mnclglf.mark, mnclglf_kernels; print(mnclglf_kernels.__file__)").stdout == (
        f"{copy.root}/kernels/mnclglf_kernels/__init__.py\n"
    )
    assert not (copy.root / ".git").exists()
