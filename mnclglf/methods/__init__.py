"""The pre-training methods: one file each, named as the method is, and one row each in METHODS."""

from mnclglf.config import MethodName
from mnclglf.methods.base import Losses, Method
from mnclglf.methods.byol import BYOL
from mnclglf.methods.fast_moco import FastMoCo
from mnclglf.methods.mnclglf import MNCLGLF
from mnclglf.methods.mnclglf_official import MNCLGLFOfficial
from mnclglf.methods.mocov2 import MoCoV2
from mnclglf.methods.nnclr import NNCLR
from mnclglf.methods.simclr import SimCLR
from mnclglf.methods.simsiam import SimSiam
from mnclglf.methods.supervised import Supervised

METHODS: dict[MethodName, type[Method]] = {
    "mnclglf": MNCLGLF,
    "mnclglf_official": MNCLGLFOfficial,
    "supervised": Supervised,
    "simclr": SimCLR,
    "mocov2": MoCoV2,
    "simsiam": SimSiam,
    "byol": BYOL,
    "nnclr": NNCLR,
    "fast_moco": FastMoCo,
}

__all__ = ["METHODS", "Losses", "Method"]
