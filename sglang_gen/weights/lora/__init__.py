"""LoRA files: their layouts, settings and factors."""
