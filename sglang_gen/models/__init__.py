"""Networks, written like their papers: torch and einops only, no knowledge of devices, ranks or files."""
