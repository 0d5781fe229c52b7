"""Answers from retrieved gradients."""
