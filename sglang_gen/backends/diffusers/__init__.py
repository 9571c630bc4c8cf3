"""The diffusers backend: the model's own pipeline, one option group a file, each reading back what took effect."""
