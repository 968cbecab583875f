"""Sending work to a cluster, and following it there."""
