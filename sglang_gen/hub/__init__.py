"""Locates a model's files (folders, single files, Hugging Face, ModelScope) and reads their configs and headers."""
