"""Metrics, cost measurement, and the result records."""
