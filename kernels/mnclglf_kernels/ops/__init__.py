"""The operators: contract, PyTorch form and choice of a backend, one file each."""
