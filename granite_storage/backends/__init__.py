"""Storage backends: the protocols in `base`, and one module for each backend, imported when it is needed."""
