"""Frozen networks and tokenisers that a family conditions on."""
