"""Settings of training, evaluation, lengths and recipes; no torch."""
