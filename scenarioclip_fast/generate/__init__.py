"""Data sets of scenes from raw images: a vision-language model, a detector, a segmenter, and curation."""
