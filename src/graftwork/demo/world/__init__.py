"""Data of the offline world, in the on-disk formats of the real readers."""
