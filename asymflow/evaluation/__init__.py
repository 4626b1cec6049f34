"""How samples are held against data: features, and the distance between their distributions."""
