"""mnclglf export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mnclglf.commands.base import Run
from mnclglf.exporting.formats import Format, NetworkName, choose_formats
from mnclglf.runs.console import say


def size(count: int) -> str:
    """Returns a number of bytes in MB, or in kB below 0.1 MB."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's encoder as other programs load it: safetensors, ONNX, a torch.export program and a model card."""

    run: Run
    """Run directory."""
    out: Path | None = None
    """Folder to make; None is RUN/export. An earlier export there is replaced."""
    formats: tuple[Format, ...] | None = None
    """Formats to write; None takes all that can be written here."""
    head: bool = False
    """Export projector and predictor too; of supervised training the classifier."""
    network: NetworkName = "online"
    """online: the encoder that is evaluated. momentum: the momentum network's."""
    checkpoint: Path | None = None
    """Checkpoint to export; None is the newest."""

    def check(self) -> None:
        choose_formats(self.formats)

    def execute(self, console: Console) -> int:
        from mnclglf.api import export
        from mnclglf.exporting.folder import FACTS
        from mnclglf.runs.files import read_object

        chosen, left_out = choose_formats(self.formats)
        if left_out:
            say(Console(stderr=True), left_out, style="yellow")
        folder = export(
            self.run, self.out, formats=chosen, head=self.head, network=self.network, checkpoint=self.checkpoint
        )
        facts = read_object(folder / FACTS) or {}
        for name, entry in facts["files"].items():
            say(console, f"{name}: {size(entry['bytes'])}")
        if "safetensors" in chosen:
            say(console, f"encoder.safetensors: {facts['encoder']['loads_in']}")
        say(console, f"export: {folder}; its README.md shows how each file is loaded")
        return 0
