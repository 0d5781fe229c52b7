"""Text processing of ReGrad: requests, prompts, pairs, generation and sampling."""
