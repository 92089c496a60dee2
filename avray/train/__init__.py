"""Training: one loop for every family, and the driver that runs it on Ray Train."""
