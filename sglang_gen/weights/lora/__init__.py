"""LoRA files: layouts, settings and factors."""
