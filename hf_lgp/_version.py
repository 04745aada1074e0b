"""The package's version, readable without importing its dependencies."""

__version__ = "0.1.0.dev0"
