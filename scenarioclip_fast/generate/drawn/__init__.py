"""A detector, a segmenter and scores for drawn scenes, to run the pipeline without models; see `data.synthetic`."""
