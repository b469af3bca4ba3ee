"""cuDNN backend of the convolutions, registered as torch.ops.mnclglf.cudnn_*.

Importing this needs no package: nvidia-cudnn-frontend is imported when the first plan is built. Without a plan, and on
other devices than CUDA, the operators run the PyTorch form.
"""

from mnclglf_kernels._cudnn import convolution

__all__ = ["convolution"]
