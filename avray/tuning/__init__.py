"""Sweeps: many trials of the training driver on Ray Tune, a journal of what they came to, and the best of them."""
