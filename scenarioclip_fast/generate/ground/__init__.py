"""Boxes for the names of each image."""
