"""The Triton kernels, registered as torch.ops.mnclglf.*; importing this package needs triton."""

from mnclglf_kernels._triton import augment, contrastive, neighbor, patches, queue

__all__ = ["augment", "contrastive", "neighbor", "patches", "queue"]
