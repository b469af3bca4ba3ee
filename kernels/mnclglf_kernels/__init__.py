"""The operators of the hot path, usable alone: `from mnclglf_kernels import contrastive_loss`.

Letters in shapes: N images, C channels, H and W sides, F feature width, S = C(4, k) subsets, D embedding width,
K queue rows, M queries.
"""

from mnclglf_kernels.augment import augment
from mnclglf_kernels.backend import HAS_FAISS, HAS_TRITON, Backend, Backends, resolve
from mnclglf_kernels.contrastive import contrastive_loss, contrastive_losses
from mnclglf_kernels.neighbor import nearest_neighbor
from mnclglf_kernels.nt_xent import nt_xent
from mnclglf_kernels.patches import combine, divide
from mnclglf_kernels.queue import enqueue
from mnclglf_kernels.queue_contrastive import queue_contrastive_loss

if HAS_TRITON:
    from mnclglf_kernels import _triton as _triton  # registers torch.ops.mnclglf.*
if HAS_FAISS:
    from mnclglf_kernels import _faiss as _faiss

__all__ = [
    "Backend",
    "Backends",
    "augment",
    "combine",
    "contrastive_loss",
    "contrastive_losses",
    "divide",
    "enqueue",
    "nearest_neighbor",
    "nt_xent",
    "queue_contrastive_loss",
    "resolve",
]
