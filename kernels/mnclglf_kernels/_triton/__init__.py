"""The Triton kernels, registered as torch.ops.mnclglf.*; importing this package needs triton."""

from mnclglf_kernels._triton import augment, contrastive, neighbor, nt_xent, patches, queue, queue_contrastive

__all__ = ["augment", "contrastive", "neighbor", "nt_xent", "patches", "queue", "queue_contrastive"]
