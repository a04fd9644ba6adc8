"""Makes a `.qvl` file out of a published checkpoint."""
