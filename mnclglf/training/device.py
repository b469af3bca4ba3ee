"""Which device and which precision a run gets."""

from __future__ import annotations

import torch

from mnclglf.config import EngineConfig, require
from mnclglf_kernels.backend import CPU_MULTIPLIES_BF16


def choose_device(config: EngineConfig) -> torch.device:
    """The device of the run; ValueError where cuda is asked for and torch sees none."""
    available = torch.cuda.is_available()
    require(
        config.device != "cuda" or available,
        "device cuda was asked for, but torch sees no GPU; check nvidia-smi and the driver, or take --device cpu",
    )
    require(
        config.graphs != "on" or (available and config.device != "cpu"),
        "graphs on asks for CUDA graphs, and this run is on the CPU; take --graphs auto",
    )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def autocast_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """bfloat16, float16 or float32; "auto" takes bfloat16 where the device multiplies it in hardware."""
    if config.precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if CPU_MULTIPLIES_BF16 else torch.float32
