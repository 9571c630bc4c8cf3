"""A family for tests alone: videos from two denoising networks, one for high and one for low noise."""
