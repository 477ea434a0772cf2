"""Training and evaluating length models."""
