"""What eager PyTorch launches and moves, counted as mnclglf_kernels._triton.traffic counts a launch's unique bytes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Eager(TorchDispatchMode):
    """Counts within it, also on the meta device. An operation that makes no view is one launch, which is the least.

    Its bytes are those of its operands and results, each once; what it writes into is not also read.
    """

    launches: int = 0
    unique_bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        empty = func in (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)
        if not (func.is_view or empty or func == torch.ops.aten.detach.default):
            self.launches += 1
            if func == torch.ops.aten.index_put_.default:  # writes its values over some rows of its first operand
                args, result = (args[1], args[2], args[2].detach().clone()), None
            tensors = [
                x for x in (*tree_leaves(args), *tree_leaves(kwargs), *tree_leaves(result)) if isinstance(x, Tensor)
            ]
            self.unique_bytes += sum({id(x): x.numel() * x.itemsize for x in tensors}.values())
        return result
