"""raytorch: a distributed PyTorch training service on Ray."""

from importlib import metadata

__version__ = metadata.version("raytorch")
