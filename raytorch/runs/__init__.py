"""A run's folder: where it is stored, what it holds, and which runs there are."""
