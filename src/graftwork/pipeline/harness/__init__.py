"""Grafts in EleutherAI's lm-eval: a model type for its command, and its tasks in `graftwork evaluate`."""
