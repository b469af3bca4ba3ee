"""The Triton kernels, registered as torch.ops.mnclglf.*; importing this package needs triton."""

from mnclglf_kernels._triton import contrastive, neighbor, patches, queue

__all__ = ["contrastive", "neighbor", "patches", "queue"]
