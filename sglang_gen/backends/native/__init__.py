"""The native backend: our networks and loop with the model's own text encoders and scheduler."""
