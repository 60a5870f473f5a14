"""Latent diffusion models: training, sampling and evaluation."""
