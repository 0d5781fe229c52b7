"""ReGrad: documents recalled as gradients at question time."""
