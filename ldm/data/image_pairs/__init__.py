"""Pairs of images: super-resolution, inpainting, masks and maps."""
