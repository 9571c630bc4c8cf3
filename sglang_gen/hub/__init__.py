"""Where a model's files are and what they hold: folders, single files, Hugging Face, ModelScope."""
