"""Parallelism over ranks. Only this package and `launch` communicate between processes."""
