"""The version of the package, of which files and reports tell."""

__version__ = "0.2.0"
