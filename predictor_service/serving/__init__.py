"""The predictor's HTTP service."""
