"""Torch-free foundations: configuration, files, registries, run folders, processes, examples."""
