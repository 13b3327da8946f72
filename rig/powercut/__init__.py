"""Powercut pulls the plug on a disk image at every possible instant, and shows what survives."""

__version__ = "0.1.0"
