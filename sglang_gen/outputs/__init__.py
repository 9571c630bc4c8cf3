"""Everything a run writes: images, videos, sound, run records, prompt archives, trackers."""
