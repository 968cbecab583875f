"""Models, shipped ones and a user's own, and how each is trained and judged."""
