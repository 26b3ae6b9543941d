"""Training: losses, metrics, the engine and its recipes."""
