"""Joining Ray, its worker groups, and what fits on its nodes: most of what touches Ray's internals."""

from raytorch.cluster.joining import joined_ray

__all__ = ["joined_ray"]
