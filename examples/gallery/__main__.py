"""Start the gallery: `python -m examples.gallery`; `--help` lists the options."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from contextlib import ExitStack

import uvicorn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.gallery", description="A gallery on SQLite and the local disk.")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GALLERY_PORT", "8000")), help="8000 unless chosen")
    parser.add_argument(
        "--folder",
        default=os.environ.get("GALLERY_FOLDER"),
        help="where rows and files are kept; temporary unless chosen",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that a temporary folder is removed then too
    with ExitStack() as stack:
        # The application reads it on import. There is no login, so it listens on this machine only.
        os.environ["GALLERY_FOLDER"] = options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="gallery-"))
        os.environ.setdefault("GALLERY_URL", f"http://127.0.0.1:{options.port}")
        kept = "kept" if options.folder else "removed at the end"
        print(f"The gallery is at http://127.0.0.1:{options.port} (Ctrl+C ends it).")
        print(f"Its rows and files are in {os.environ['GALLERY_FOLDER']}, {kept}.", flush=True)
        uvicorn.run("examples.gallery.app:app", host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
