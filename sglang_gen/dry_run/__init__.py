"""Estimates for a run, made without loading weights: memory, communication, FLOPs, and time on a named machine."""
