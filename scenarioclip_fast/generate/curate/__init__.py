"""Curation: names, doubtful objects and relations, decisions made by hand, negatives, and merging of classes."""
