"""Diffusers backend: the model's own pipeline; one module per option group, each reading back what took effect."""
