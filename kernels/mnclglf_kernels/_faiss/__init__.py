"""FAISS backend of the nearest-neighbor lookup, registered as torch.ops.mnclglf.faiss_nearest_neighbor."""

from mnclglf_kernels._faiss import neighbor

__all__ = ["neighbor"]
