"""A scaling study, from its plan to its picture."""
