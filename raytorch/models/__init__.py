"""The shipped models, and how each is trained and judged."""
