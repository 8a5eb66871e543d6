"""Recommenders in which a language model reads the user-item graph."""

__version__ = "0.1.0"
