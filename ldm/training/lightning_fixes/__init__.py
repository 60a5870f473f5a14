"""What works around Lightning: exact resume, signals, metrics, skipped steps."""
