"""Starting a run's processes: the launcher, its workers, torchrun, and what every rank does."""
