"""A discrete-event simulation of generation, judging and training."""
