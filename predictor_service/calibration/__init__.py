"""Online calibration of predictions to each model's observed lengths."""
