"""Records of metrics.jsonl as a report takes them."""

from collections.abc import Sequence

from mnclglf.reports.series import Metrics, collect
from mnclglf.runs.metrics import Record


def metrics_of(records: Sequence[Record], at_once: int = 3) -> Metrics:
    """Returns the figures of records, which come some at a time, as from a file."""
    return collect((list(records[i : i + at_once]), 0) for i in range(0, len(records), at_once))
