"""Graft published methods onto pretrained transformers."""
