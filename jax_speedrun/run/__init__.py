"""A run: the loop around the step, its folder, checkpoints, processes and compiled programs."""
