"""A chat backend that never loses a word."""

__version__ = "0.1.0"
