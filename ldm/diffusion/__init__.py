"""Diffusion mathematics: schedules, parameterisations, objectives and guidance; torch only."""
