"""Foundations without torch: configuration, files, registries, run folders, processes, examples."""
