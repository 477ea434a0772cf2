"""Studies of the output-length predictor; docs/results/predictor.md has their results."""
