"""What an attack did: one row of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """What one kind of attack did."""

    attack: str
    tried: int = 0
    lost: list[str] = field(default_factory=list[str])
    """What was lost or wrong, by attack."""

    def add(self, case: str, problems: list[str]) -> None:
        """Adds one attack and what was lost by it."""
        self.tried += 1
        if problems:
            self.lost.append(f"{case}: {'; '.join(problems)}")


def table_of(rows: Sequence[Row]) -> str:
    """Returns the table of attacks as Markdown, with what was lost below it."""
    lines = ["| attack | tried | survived | lost |", "|---|--:|--:|--:|"]
    lines += [f"| {row.attack} | {row.tried} | {row.tried - len(row.lost)} | {len(row.lost)} |" for row in rows]
    lost = [f"- {row.attack}: {' '.join(what.split())}" for row in rows for what in row.lost]
    return "\n".join([*lines, *([""] if lost else []), *lost]) + "\n"
