"""Ablation studies: many trainings that differ in named axes, evaluated alike and reported together."""
