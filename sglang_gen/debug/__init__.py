"""Finding where two computations that should be the same part ways."""
