"""A run from its driver to the loop on each worker."""
