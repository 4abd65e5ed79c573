"""The version: one string that everything below may read."""

__version__ = "0.1.0"
