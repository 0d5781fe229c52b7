"""Memory estimates: the real code of every stage, run on fake tensors."""
