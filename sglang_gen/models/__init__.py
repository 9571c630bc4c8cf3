"""The networks, written as in their papers with torch and einops only, independent of devices, ranks and files."""
