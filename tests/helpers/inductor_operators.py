"""Prints, as JSON, the operators whose launches in a compiled graph for sm_ARGUMENT are not those of their table's row.

It is a script: Inductor keeps what it is told about a GPU for the rest of its process.
"""

import json
import sys
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config
from torch.utils._pytree import tree_leaves

from bench.inductor import OURS, count
from mnclglf_kernels.operators import OPERATORS, Example, Operator
from mnclglf_kernels.sizes import PAPER

SIZES = PAPER._replace(images=8, side=16, queue=64, source=16)


def results(row: Operator, arguments: dict[str, Any]) -> list[Tensor]:
    """Returns a scalar of each result, which a backward can start from."""
    made = tree_leaves(row.function(**arguments, backend="triton"))
    return [x.float().sum() for x in made if isinstance(x, Tensor)]


def difference(row: Operator, arch: int) -> str | None:
    arguments = row.inputs(Example(sizes=SIZES, dtype=torch.bfloat16, device=torch.device("cpu")))
    with config.patch(force_non_lazy_backward_lowering=True):
        graphs = count(torch.compile(partial(results, row, arguments), fullgraph=True), arch=arch)
    counted = [x for graph in graphs for made in graph.own.values() for x in made]
    expected = row.launches(Example(sizes=SIZES, dtype=torch.bfloat16), arch)
    expected = [x for x in expected if not x.arguments.get("OF_KEYS")]  # the example's keys need no gradient
    ours, theirs = (
        Counter((x.kernel.__name__, x.grid, x.traffic) for x in launches) for launches in (counted, expected)
    )
    launched, moved = (sum(getattr(graph, name)[OURS] for graph in graphs) for name in ("launches", "moved"))
    if (ours, launched, moved) == (theirs, len(expected), sum(x.traffic.unique_bytes for x in expected)):
        return None
    return f"{launched} launches of {moved} bytes: {ours}, not {theirs}"


found = {name: difference(row, int(sys.argv[1])) for name, row in OPERATORS.items()}
print(json.dumps(found))
