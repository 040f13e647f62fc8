"""Masks for the boxes of each image."""
