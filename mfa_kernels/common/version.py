"""The version of the package, of which files and reports tell."""

__version__ = "0.1.0"
