"""A local web page over run folders: curves, images, configs, and samples drawn on demand."""
