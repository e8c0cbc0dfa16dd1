"""Sweeps: many runs whose settings are drawn from a space, on Ray Tune, with the run folders as their only memory."""
