"""Writes an export: weights, graphs, model card and export.json in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mnclglf.config import RunConfig
from mnclglf.exporting.card import model_card
from mnclglf.exporting.folder import CARD, check_place, make_folder
from mnclglf.exporting.formats import NetworkName
from mnclglf.exporting.graphs import write_graphs
from mnclglf.exporting.networks import Exported, facts_of, header
from mnclglf.exporting.weights import TimmTwin, Twin, find_twin, loads_in, write_safetensors
from mnclglf.runs.results import Result


def write_export(
    folder: Path,
    formats: Sequence[str],
    exported: Exported,
    config: RunConfig,
    state: Mapping[str, Any],
    network: NetworkName,
    results: Sequence[Result],
) -> None:
    """Writes the export whole or not at all, in place of an earlier export in `folder`.

    Args:
        folder: place of the export, an absolute path.
        formats: some of safetensors, onnx and pt2.
        exported: the networks.
        config: settings of the run.
        state: content of the checkpoint, with step, mean and std.
        network: network of the method that is exported.
        results: evaluations of the run, for the model card.

    Raises:
        UsageError, OSError, ExportError: the folder is not free, cannot be written, or a format cannot hold the
            networks.
    """
    check_place(folder)
    facts = facts_of(exported, config, state, network)
    twin = find_twin(exported)
    settings = {name: value for name, value in facts["encoder"].items() if name in facts["settings"]["model"]}
    facts["encoder"] |= {
        "torchvision": twin.name if isinstance(twin, Twin) else None,
        "timm": None if twin is None else twin.name,
        "timm_options": twin.options if isinstance(twin, TimmTwin) else {},
        "small_stem": isinstance(twin, Twin) and twin.small_stem,
        "loads_in": loads_in(exported.encoder, settings, twin),
    }

    def write(made: Path) -> dict[str, Any]:
        if "safetensors" in formats:
            write_safetensors(exported, made, header(facts))
        if "onnx" in formats or "pt2" in formats:
            write_graphs(exported, made, formats, header(facts))
        (made / CARD).write_text(model_card(exported, facts, formats, results), encoding="utf-8")
        return facts

    make_folder(folder, write)
