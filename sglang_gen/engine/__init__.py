"""What the native engine does with a network."""
