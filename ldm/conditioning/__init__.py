"""Conditioners: from a batch to what the denoising network is conditioned on."""
