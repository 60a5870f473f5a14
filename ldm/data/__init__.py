"""Data sets and loaders; the batch contract."""
