"""What works around Lightning (seen in 2.6.6): exact resume, signals, metrics, skipped steps."""
