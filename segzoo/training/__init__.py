"""What training takes: losses and metrics. `benchmarks/train_scenes.py` is a plain loop around them."""
