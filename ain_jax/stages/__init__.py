"""Each stage of an experiment, read from top to bottom."""
