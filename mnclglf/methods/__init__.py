"""The pre-training methods: one file each, one line each in METHODS."""

from mnclglf.config import MethodName
from mnclglf.methods.method import Losses, Method
from mnclglf.methods.mnclglf import MNCLGLF

METHODS: dict[MethodName, type[Method]] = {"mnclglf": MNCLGLF}

__all__ = ["METHODS", "MNCLGLF", "Losses", "Method"]
