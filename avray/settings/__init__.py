"""The groups of settings, one file each. Import them from :mod:`avray.config`."""
