"""Studies of the length predictor."""
