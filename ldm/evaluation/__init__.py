"""Measures of samples and reconstructions."""
