"""Generating on request: one from the command line, or one for each row of a file on Ray Data."""
