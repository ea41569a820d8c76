"""Rounders: a weight, its layer's statistics and a format in; storable blocks out. One file and one line below each."""

from qronos_export.rounding.coupled import Coupled
from qronos_export.rounding.gpfq import gpfq
from qronos_export.rounding.gptaq import gptaq
from qronos_export.rounding.gptq import gptq, ldlq
from qronos_export.rounding.held_out import chosen
from qronos_export.rounding.magr import magr
from qronos_export.rounding.qronos import qronos
from qronos_export.rounding.rounded import Rounded, Rounder, Settings
from qronos_export.rounding.rtn import blind, rtn

ROUNDERS: dict[str, Rounder] = {
    "qronos": qronos,
    "gptaq": gptaq,
    "gptq": gptq,
    "ldlq": ldlq,
    "gpfq": gpfq,
    "rtn": rtn,
}

CORRECTING = ("qronos", "gptaq")  # those that use β

__all__ = [
    "CORRECTING",
    "ROUNDERS",
    "Coupled",
    "Rounded",
    "Rounder",
    "Settings",
    "blind",
    "chosen",
    "gpfq",
    "gptaq",
    "gptq",
    "magr",
    "qronos",
    "rtn",
]
