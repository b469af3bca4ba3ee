"""The operators, one file each: contract, PyTorch form and choice of a backend."""
