"""Data sets, transforms, loaders and the data module."""
