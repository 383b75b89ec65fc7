"""The version of slimtune; the build reads it from here, too."""

__version__ = "0.2.0.dev0"
