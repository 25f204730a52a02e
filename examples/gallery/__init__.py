"""A gallery of files that live and die with their rows: `python -m examples.gallery` starts it."""
