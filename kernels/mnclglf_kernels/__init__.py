"""The operators of the hot path, usable alone: `from mnclglf_kernels import contrastive_loss`.

Letters in shapes: N images, C channels, H and W sides, F feature width, S = C(4, k) subsets, D embedding width,
K queue rows, M queries.
"""

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.contrastive import contrastive_loss
from mnclglf_kernels.neighbor import nearest_neighbor
from mnclglf_kernels.patches import combine, divide
from mnclglf_kernels.queue import enqueue

__all__ = ["Backend", "combine", "contrastive_loss", "divide", "enqueue", "nearest_neighbor", "resolve"]
