"""What a run would need and take, without a weight: memory, communication, FLOPs, time on a named machine."""
