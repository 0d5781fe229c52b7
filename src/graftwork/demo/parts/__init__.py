"""One demonstration per method."""
