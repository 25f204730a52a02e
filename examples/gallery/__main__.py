"""Start the gallery: `python -m examples.gallery`; `--help` lists the options."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import tempfile
from contextlib import ExitStack

import uvicorn


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.gallery",
        description="A gallery on SQLite and the local disk.",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=int(os.environ.get("GALLERY_PORT", "8000")),
        help="8000 unless chosen",
    )
    parser.add_argument(
        "--folder",
        default=os.environ.get("GALLERY_FOLDER"),
        help="where rows and files are kept; temporary unless chosen",
    )
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit()
    )  # so that a temporary folder is removed then too
    with ExitStack() as stack:
        # The application reads these on import.
        os.environ["GALLERY_FOLDER"] = options.folder or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="gallery-")
        )
        url = os.environ.setdefault("GALLERY_URL", f"http://127.0.0.1:{options.port}")
        new = json.dumps({name: secrets.token_urlsafe(32) for name in ("Anna", "Ben")})
        tokens = json.loads(os.environ.setdefault("GALLERY_TOKENS", new))
        kept = "kept" if options.folder else "removed at the end"
        print(
            f"The gallery is at {url} (Ctrl+C ends it). To upload, sign in with a link:"
        )
        for name, token in tokens.items():
            print(f"  {name}: {url}/#sign-in={token}")
        print(
            f"Its rows and files are in {os.environ['GALLERY_FOLDER']}, {kept}.",
            flush=True,
        )
        uvicorn.run(
            "examples.gallery.app:app",
            host="127.0.0.1",
            port=options.port,
            log_level="warning",
        )


if __name__ == "__main__":
    main()
