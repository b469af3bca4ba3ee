"""Operators of the training step, usable on their own: `from mnclglf_kernels import contrastive_loss`.

Letters in shapes: N images, C channels, H and W sides, F feature width, S = C(4, k) subsets, D embedding width,
K queue rows, M queries.
"""

from mnclglf_kernels import _cudnn as _cudnn  # registers torch.ops.mnclglf.cudnn_*
from mnclglf_kernels import modules as _modules
from mnclglf_kernels import operators as _operators
from mnclglf_kernels.backend import HAS_FAISS, HAS_TRITON, Backend, resolve
from mnclglf_kernels.modules import *  # noqa: F403  # the losses and the queue as nn.Modules
from mnclglf_kernels.operators import *  # noqa: F403  # every operator, and Backends

if HAS_TRITON:
    from mnclglf_kernels import _triton as _triton  # registers torch.ops.mnclglf.*
if HAS_FAISS:
    from mnclglf_kernels import _faiss as _faiss

__all__ = ["Backend", "resolve", *_modules.__all__, *_operators.__all__]  # pyright: ignore[reportUnsupportedDunderAll]
