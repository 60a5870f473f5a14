"""First stage: autoencoder, regularisers and losses."""
