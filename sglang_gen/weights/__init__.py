"""Reads weight files into modules."""
