"""Adapters of other packages, one module each; none is imported before it is asked for."""
