"""Meta-training: episodes, the meta-gradient, selection of checkpoints."""
