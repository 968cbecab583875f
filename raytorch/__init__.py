"""raytorch."""
