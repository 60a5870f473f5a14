"""Samplers: generators of steps over a denoiser."""
