"""Trainer, training phases, batching, packing and sampling."""
