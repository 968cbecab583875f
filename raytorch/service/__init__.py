"""Studies and jobs on clusters."""
