"""Symmetric contrastive softmax over distinct texts: the reference and its backends."""
