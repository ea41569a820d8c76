"""Qronos calibration on the grids that file formats can store."""

__version__ = "0.1.0"
