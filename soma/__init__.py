"""Soma: raw text in, a trained, measured and served language model out."""

__version__ = "0.1.0"
