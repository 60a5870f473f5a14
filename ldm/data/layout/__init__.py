"""Bounding boxes: annotations, crops and layout tokens."""
