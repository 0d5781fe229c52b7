"""Pretraining of the tiny models of the offline world."""
