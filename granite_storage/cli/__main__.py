"""`python -m granite_storage.cli` is `granite-storage`."""

from granite_storage.cli import main

if __name__ == "__main__":
    main()
