"""Figures and HTML pages of evaluations and training runs."""
