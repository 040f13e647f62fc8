"""A model of the training step's weak scaling, checked against counts of real runs; see docs/scaling.md."""
