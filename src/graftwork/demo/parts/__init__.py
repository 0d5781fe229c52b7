"""One demonstration for each method."""
