"""A run: its folder and checkpoints, its processes, and what they print."""
