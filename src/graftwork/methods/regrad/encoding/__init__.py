"""Encoding of passages into gradients or trained adapters."""
