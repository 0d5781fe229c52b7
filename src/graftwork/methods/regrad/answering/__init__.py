"""Answering with retrieved gradients."""
