"""One run, its stages, the loop that each of them is."""
