"""Where bytes live: the Protocol in `base`, and one module for each backend, imported only when it is asked for."""
