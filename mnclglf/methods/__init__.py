"""The pre-training methods: one file each, one line each in METHODS."""

from mnclglf.config import MethodName
from mnclglf.methods.byol import BYOL
from mnclglf.methods.method import Losses, Method
from mnclglf.methods.mnclglf import MNCLGLF
from mnclglf.methods.mocov2 import MoCoV2
from mnclglf.methods.nnclr import NNCLR
from mnclglf.methods.simclr import SimCLR

METHODS: dict[MethodName, type[Method]] = {
    "mnclglf": MNCLGLF,
    "simclr": SimCLR,
    "mocov2": MoCoV2,
    "byol": BYOL,
    "nnclr": NNCLR,
}

__all__ = ["BYOL", "METHODS", "MNCLGLF", "NNCLR", "Losses", "Method", "MoCoV2", "SimCLR"]
