"""Stable Diffusion 1.5 and 2."""
