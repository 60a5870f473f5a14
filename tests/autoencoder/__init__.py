"""Tests of ldm.autoencoder; a package, because other folders have files of the same names."""
