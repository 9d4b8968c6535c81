"""Reproducible, honestly evaluated classification of breast-cancer images."""

__version__ = "0.1.0"
