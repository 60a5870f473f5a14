"""Checks of data and models before GPU time is spent."""
