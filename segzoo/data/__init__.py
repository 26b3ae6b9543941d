"""Data for training and testing segmentation models. Importing this package imports neither torch nor pillow."""
