"""Joining Ray, its worker groups, and what fits on its nodes: most of what touches Ray's internals."""
