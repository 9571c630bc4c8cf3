"""What is particular to one pipeline: its text, latents, schedule and the names of its weights."""
