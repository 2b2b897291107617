"""The version of this package, which every artifact is written with."""

__version__ = "0.1.0"
