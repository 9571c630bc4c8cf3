"""Model families of the native engine: facts, pipelines from text to images, and examples, one folder each."""
