"""Command line: what main.py and the scripts share."""
