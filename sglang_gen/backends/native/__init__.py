"""Native backend: this project's networks and denoising loop with the model's own text encoders and scheduler."""
