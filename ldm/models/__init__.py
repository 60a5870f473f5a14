"""Models that one can hold: the autoencoder and the latent diffusion model, their sampling and loading."""
