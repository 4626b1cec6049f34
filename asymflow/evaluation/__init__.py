"""Comparing samples with data: features of images, and the distance between the distributions of features."""
