"""A gallery whose files commit and roll back with their rows: `python -m examples.gallery` starts it."""
