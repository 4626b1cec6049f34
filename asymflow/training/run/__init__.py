"""A run: its folder, its processes and what they say."""
