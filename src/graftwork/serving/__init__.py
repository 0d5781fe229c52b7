"""A server that answers from a model with regrad: its line of requests, its endpoints, and its page."""
