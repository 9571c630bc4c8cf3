"""Multiruns: sweeps over settings with Hydra, and tables of their results."""
