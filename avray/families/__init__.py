"""Model families, one file each. The platform reaches them only by name, through the registry."""
