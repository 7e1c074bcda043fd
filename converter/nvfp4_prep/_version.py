"""The version, apart from everything that needs it."""

__version__ = "0.2.0"
