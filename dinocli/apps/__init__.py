"""Applications of features. No folder imports another, but the demo draws attention maps."""
