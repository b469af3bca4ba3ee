"""The model card: README.md of an export, whose Python blocks run in its folder."""

from __future__ import annotations

import importlib.resources
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, StrictUndefined
from torch import nn

from mnclglf.exporting.networks import Exported
from mnclglf.methods import method_of
from mnclglf.models.batch_norm import BatchNorm
from mnclglf.reports.tables import ResultTable, result_table, to_markdown
from mnclglf.runs.results import Result

PAPER = (
    "Weiquan Li, Xianzhong Long, Yun Li. Multi-network Contrastive Learning Based on Global and Local Features. "
    "Preprint submitted to Elsevier."
)
MEASURED = {
    "knn": "k nearest neighbors: the training images nearest by cosine similarity vote, weighted by similarity",
    "linear": "linear evaluation: one linear layer, trained by LARS on the frozen encoder with augmented images",
    "logistic": "logistic regression on features computed once; C chosen on held-out training images",
    "logistic_10_labels": "the same with 10 labels per class, mean and standard deviation over draws of labels",
}
MARKUP = set("\\`*_[]<>|~&")


def model_card(exported: Exported, facts: Mapping[str, Any], formats: Sequence[str], results: Sequence[Result]) -> str:
    """Returns the text of README.md.

    Args:
        exported: the networks.
        facts: content of export.json.
        formats: formats of the export.
        results: evaluations of the run; those of other checkpoints and networks are left out.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((importlib.resources.files("mnclglf.exporting") / "card.md.jinja").read_text())
    table = results_of(facts, results)
    method = method_of(facts["trained"]["method"])
    documentation = sys.modules[method.__module__].__doc__
    return template.render(
        **facts,
        formats=formats,
        needs_labels=method.needs_labels,
        one_line={name: inline(value) for name, value in facts["trained"].items()},
        title=(documentation or "").partition("\n")[0].rstrip("."),
        head_code={name: code_of(head) for name, head in exported.heads.items()},
        channels=channels_of(exported.encoder),
        table=to_markdown(table) if table.rows else "",
        measured=[text for protocol, text in MEASURED.items() if protocol in protocols_of(facts, results)],
        left_out=len(results) - len(of_checkpoint(facts, results)),
        settings_json=json.dumps(facts["settings"], indent=2),
        paper=PAPER,
    )


def of_checkpoint(facts: Mapping[str, Any], results: Sequence[Result]) -> list[Result]:
    """Returns the results that were measured on the exported checkpoint's online encoder, or compared with it."""
    trained = facts["trained"]
    if trained["network"] != "online":
        return []
    return [result for result in results if result.settings.get("step") == trained["step"]]


def protocols_of(facts: Mapping[str, Any], results: Sequence[Result]) -> set[str]:
    """Returns the protocols of the results that the card shows."""
    return {result.protocol for result in of_checkpoint(facts, results)}


def results_of(facts: Mapping[str, Any], results: Sequence[Result]) -> ResultTable:
    """Returns the table of the results that the card shows."""
    return result_table([asdict(result) for result in of_checkpoint(facts, results)])


def inline(value: object) -> str:
    """Returns a value as text that Markdown takes as one cell of a table, whatever is in it."""
    text = " ".join(str(value).split()).encode(errors="backslashreplace").decode()
    shown = (letter if letter.isprintable() else "?" for letter in text)
    return "".join(f"\\{letter}" if letter in MARKUP else letter for letter in shown)


def channels_of(encoder: nn.Module) -> int:
    """Returns the channels after the encoder's first convolution."""
    return next(layer.out_channels for layer in encoder.modules() if isinstance(layer, nn.Conv2d))


def code_of(module: nn.Module) -> str:
    """Returns the expression that makes a module of the same parameters from those of PyTorch."""
    if isinstance(module, nn.Sequential):
        lines = "".join(f"    {code_of(layer)},\n" for layer in module)
        return f"nn.Sequential(\n{lines})"
    if isinstance(module, nn.Linear):
        bias = "" if module.bias is not None else ", bias=False"  # pyright: ignore[reportUnnecessaryComparison]
        return f"nn.Linear({module.in_features}, {module.out_features}{bias})"
    if isinstance(module, BatchNorm):
        return f"nn.BatchNorm1d({module.num_features}, eps={module.eps:g})"
    return f"nn.{module!r}"
