"""How a run is spread over ranks. Here and in launch.py alone one process speaks to another."""
