"""Decisions from facts, before a weight is read: backend, degrees, sizes, dtype, and every refusal."""
