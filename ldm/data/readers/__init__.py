"""Readers of folders, ImageNet, LSUN, Parquet and embeddings."""
