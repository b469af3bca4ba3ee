"""The Triton kernels, registered as torch.ops.mnclglf.*. Importing this package needs triton."""

from importlib import import_module

from mnclglf_kernels.operators import OPERATORS

for _name in OPERATORS:
    import_module(f"{__name__}.{_name}")
