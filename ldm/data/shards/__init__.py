"""WebDataset shards: map-style and as resumable streams."""
