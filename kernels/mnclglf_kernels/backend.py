"""Choice of the backend that an operator runs: one function makes it for all operators."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch", "faiss", "cudnn"]
Resolved = Literal["triton", "torch", "faiss", "cudnn"]
Kind = Literal["elementwise", "matmul", "lookup", "convolution"]


HAS_TRITON = find_spec("triton") is not None
HAS_FAISS = find_spec("faiss") is not None
HAS_CUDNN = find_spec("cudnn") is not None  # nvidia-cudnn-frontend; cuDNN itself comes with torch
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it
CPU_MULTIPLIES_BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
TRITON_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve(backend: Backend, *tensors: Tensor, kind: Kind = "elementwise") -> Resolved:
    """Returns the backend that an operator called with `backend` on `tensors` runs.

    "auto" is "triton" on CUDA if Triton can run there, and "torch" otherwise. A convolution's "auto" is "torch": which
    one is fastest is to be timed. If TRITON_INTERPRET=1 is set before the import, "triton" also runs on the CPU, where
    it interprets its kernels slowly. On the meta device it returns shapes.

    Args:
        backend: backend that the caller asked for.
        tensors: all tensor arguments of the operator.
        kind: kind of operator. Only the lookup has FAISS, only the convolution cuDNN. Triton kernels that multiply
            matrices have no fp64.

    Raises:
        ValueError: `backend` is unknown or not available for this operator, or the tensors are on several devices.
        RuntimeError: the backend was named and cannot run here; only "auto" falls back.
        TypeError: the backend was named and does not take a dtype.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is not one of {', '.join(get_args(Backend))}")
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"tensors are on {device} and on {tensor.device}; move them to one device")
    if backend == "auto":
        if kind == "convolution":
            return "torch"
        return "triton" if device.type == "cuda" and triton_problem(tensors, kind) is None else "torch"
    if backend == "triton" and (problem := triton_problem(tensors, kind)) is not None:
        raise problem
    if backend == "faiss" and kind != "lookup":
        raise ValueError("backend 'faiss' has only nearest_neighbor; use 'auto' here")
    if backend == "faiss" and (problem := faiss_problem(device)) is not None:
        raise problem
    if backend == "cudnn" and kind != "convolution":
        raise ValueError("backend 'cudnn' has only convolution; use 'auto' here")
    if backend == "cudnn" and (problem := cudnn_problem(device, tensors[0].dtype)) is not None:
        raise problem
    return backend


def triton_problem(tensors: tuple[Tensor, ...], kind: Kind) -> Exception | None:
    """Returns the reason why the Triton kernels cannot run on these tensors, or None."""
    device = tensors[0].device
    if not HAS_TRITON:
        return RuntimeError("backend 'triton' needs the package triton, which is not installed; use 'torch'")
    if device.type not in ("cuda", "meta") and not INTERPRETED:  # meta tensors need only shapes
        return RuntimeError(
            f"backend 'triton' needs CUDA tensors, got one on {device}; use 'auto' or 'torch' (or set "
            "TRITON_INTERPRET=1 before the import, to interpret the kernels)"
        )
    if device.type == "cuda" and torch.version.hip is not None:
        return RuntimeError("backend 'triton' is for NVIDIA GPUs, and this torch is built for AMD's; use 'torch'")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)  # Dynamo folds this call into a constant
        if properties.major < 8:
            return RuntimeError(
                f"backend 'triton' needs an NVIDIA GPU of compute capability 8.0 or newer, {properties.name} has "
                f"{properties.major}.{properties.minor}; use 'auto' or 'torch'"
            )
    for tensor in tensors:
        if kind != "elementwise" and tensor.dtype not in TRITON_DTYPES.values():
            return TypeError(f"backend 'triton' multiplies fp32, fp16 and bf16, not {tensor.dtype}; use 'torch'")
    return None


def faiss_problem(device: torch.device) -> Exception | None:
    """Returns the reason why FAISS cannot search on this device, or None."""
    if not HAS_FAISS:
        return RuntimeError(
            "backend 'faiss' needs the package faiss, which is not installed; pip install 'mnclglf[faiss-gpu]' on a "
            "machine with an NVIDIA GPU, 'mnclglf[faiss-cpu]' elsewhere, or use 'auto'"
        )
    try:
        gpus = faiss_gpus() if device.type == "cuda" else 0
    except (ImportError, OSError) as error:  # a library of another CUDA version
        return RuntimeError(
            f"backend 'faiss' was asked for, and the installed faiss does not load ({error}); PyPI's is for "
            "CUDA 12: pip install nvidia-cublas-cu12 nvidia-cuda-runtime-cu12, or use 'auto'"
        )
    if device.type == "cuda" and gpus == 0:  # knn_gpu would abort the process
        return RuntimeError(
            f"backend 'faiss' was given tensors on {device}, but this build of faiss sees no GPU; pip install "
            "'mnclglf[faiss-gpu]' in place of faiss-cpu, or use 'auto'"
        )
    if device.type not in ("cpu", "cuda"):
        return RuntimeError(f"backend 'faiss' searches on CUDA and on the CPU, not on {device}; use 'torch'")
    return None


def cudnn_problem(device: torch.device, dtype: torch.dtype) -> Exception | None:
    """Returns the reason why cuDNN's fused convolutions cannot run on this device in this dtype, or None."""
    if not HAS_CUDNN:
        return RuntimeError(
            "backend 'cudnn' needs the package nvidia-cudnn-frontend, which is not installed; pip install "
            "'mnclglf[cudnn]', or use 'auto'"
        )
    if device.type != "cuda" or torch.version.hip is not None:
        return RuntimeError(f"backend 'cudnn' needs an NVIDIA GPU, got a tensor on {device}; use 'auto' or 'torch'")
    if dtype not in (torch.float16, torch.bfloat16):
        return TypeError(f"backend 'cudnn' convolves fp16 and bf16, not {dtype}; use 'auto' or 'torch'")
    return None


@torch.compiler.assume_constant_result
def faiss_gpus() -> int:
    """Returns the number of GPUs that the installed build of FAISS can search on."""
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


def first_line(error: Exception) -> str:
    """Returns an exception's type and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no text'}"
