"""Starts the processes of a run, by the launcher or under torchrun, and carries out the plan on every rank."""
