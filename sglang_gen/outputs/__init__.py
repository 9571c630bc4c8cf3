"""Outputs of a run: images, videos, audio files, run records, trackers, and the path of the perf dump."""
