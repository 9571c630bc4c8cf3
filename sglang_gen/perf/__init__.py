"""Measuring a run: stage and step times, memory, work, the machine, and the dump that holds them."""
