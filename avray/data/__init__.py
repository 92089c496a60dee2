"""Rows in: manifests, splits, the order they are seen in, and the cache of what frozen networks make of them."""
