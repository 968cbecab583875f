"""Blocks of samples that lie together in files, such as row groups and shards: what is read and kept as a whole."""

TOGETHER = 8
"""Blocks whose samples follow one another in any order, with ``shuffle: blocks``; a source keeps as many at hand."""
