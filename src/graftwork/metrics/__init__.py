"""Metrics, cost measurement, and what a measurement is."""
