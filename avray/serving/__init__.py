"""Checkpoints behind one HTTP server, on Ray Serve: a torch-free gateway, and an application of its own per model."""
