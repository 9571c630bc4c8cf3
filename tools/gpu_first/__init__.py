"""The first minutes on a GPU: what works, how fast it is, and what fails, as one Markdown report."""
