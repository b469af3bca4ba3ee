"""The pre-training methods: one file each, named as the method is, and one row each in METHODS; `method_of` also finds
those of other packages."""

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
from mnclglf.plugins import METHODS_GROUP, check_subclass, is_class_name, load_class, load_entry_point

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

__all__ = ["METHODS", "Losses", "Method", "method_of"]


def method_of(name: MethodName) -> type[Method]:
    """Returns the method of a name: of METHODS, of an entry point of the group mnclglf.methods, or MODULE:CLASS.

    Raises:
        PluginError: there is no such method, it cannot be imported, or it is no Method.
    """
    if name in METHODS:
        return METHODS[name]
    found = load_class(name) if is_class_name(name) else load_entry_point(METHODS_GROUP, name)
    return check_subclass(found, Method, name)
