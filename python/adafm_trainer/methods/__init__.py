"""Transfer methods: which networks are built, what of them is trained, and from when on."""

from __future__ import annotations

from ..errors import UsageError
from .base import TransferMethod


def method_by_name(name: str) -> TransferMethod:
    """The method called ``name``.

    Raises:
        UsageError: there is no such method.
    """
    from .adafm import AdaFM
    from .bsa import BSA
    from .gan_memory import GanMemory
    from .minegan import MineGAN
    from .scratch import Scratch
    from .transfergan import FreezeD, TransferGAN

    methods = {method.name: method for method in (AdaFM, TransferGAN, MineGAN, GanMemory, FreezeD, BSA, Scratch)}
    if name not in methods:
        raise UsageError(f"unknown method {name!r}; expected one of {', '.join(methods)}")
    return methods[name]()
