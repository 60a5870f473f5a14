"""Recorded numbers of the reference implementation, run against the public classes of the project."""
