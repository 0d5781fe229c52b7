"""Gradient bank: storage, locks, records, transfer and verification."""
