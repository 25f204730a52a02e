"""A gallery, started by `python -m examples.gallery`."""
