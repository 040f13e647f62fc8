"""Symmetric contrastive softmax over distinct texts: the law (`reference`) and its backends."""
