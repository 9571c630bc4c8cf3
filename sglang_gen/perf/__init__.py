"""Measures a run (stage and step times, memory, FLOPs, machine rates), writes perf dumps and compares them."""
