"""Files of weights: read without running code, written whole, loaded into modules strictly."""
