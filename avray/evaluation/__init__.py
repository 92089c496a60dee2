"""Evaluation of a checkpoint or a codec, and its report."""
