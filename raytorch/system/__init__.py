"""This machine: its processes, temporary folders, memory and terminal, and text that is safe to show."""
