"""Use the README's program as its reader would: `python -I .ci/use_readme.py README.md`, in an empty folder.

The interpreter's environment has the wheel and what the README installs with it, and nothing else. The program is started with
its server, and gets requests of a client on a socket.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

TOKEN = "a-long-random-token"  # noqa: S105  # the README's own
BOUNDARY = "boundary-of-this-form"
PATIENCE = 120.0
"""How long the server may take to start, and its worker to delete a file, in seconds."""


class Client:
    """Sends requests to the program, with a token or without one."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def send(
        self, method: str, path: str, body: bytes | None = None, *, token: str = TOKEN, range_: str = ""
    ) -> tuple[int, str, bytes]:
        """Return the status, the media type and the body of a response."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        if range_:
            headers["Range"] = range_
        request = urllib.request.Request(self.address + path, data=body, headers=headers, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
                return answer.status, answer.headers.get_content_type(), answer.read()
        except urllib.error.HTTPError as answer:
            return answer.code, answer.headers.get_content_type(), answer.read()


def form_of(name: str, media_type: str, content: bytes) -> bytes:
    head = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\nContent-Type: {media_type}'
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def require(what: str, found: object, expected: object) -> None:
    if found != expected:
        sys.exit(f"{what}: expected {expected!r}, found {found!r}")
    print(f"ok  {what}")


def require_installed_package() -> None:
    """Refuse a package that comes from a clone, or lacks its types."""
    spec = find_spec("granite_storage")
    if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(sys.prefix):
        sys.exit(f"granite_storage is not that of this environment: {spec}")
    require("the package has its types", Path(spec.origin).with_name("py.typed").is_file(), True)
    print(f"ok  granite-storage {importlib.metadata.version('granite-storage')} is in {Path(spec.origin).parent}")


def stored_files() -> list[Path]:
    return [path for path in Path("uploads").rglob("*") if path.is_file() and path.name != ".granite-storage"]


def use(client: Client) -> None:
    """Upload, list, download and delete a picture, and try what is refused."""
    picture = io.BytesIO()
    Image.new("RGB", (640, 480), "teal").save(picture, "PNG")
    content = picture.getvalue()

    status, _, body = client.send("POST", "/documents", form_of("me.png", "image/png", content))
    require("an upload", status, 201)
    document = json.loads(body)
    require("its size", document["file"]["size"], len(content))
    file = f"/documents/{document['id']}/file"
    require("original and thumbnail are in the folder", len(stored_files()), 2)
    require("the list", json.loads(client.send("GET", "/documents")[2]), [document])
    require("the download", client.send("GET", file), (200, "image/png", content))
    require("a range", client.send("GET", file, range_="bytes=1-3"), (206, "image/png", b"PNG"))
    thumbnail = client.send("GET", f"{file}?thumb=true")[2]
    require("the thumbnail", Image.open(io.BytesIO(thumbnail)).size, (200, 150))

    page = client.send("POST", "/documents", form_of("me.png", "image/png", b"<script>alert(1)</script>"))
    require("a page called a picture", page[:2], (415, "application/problem+json"))
    require("a file that was left out", client.send("POST", "/documents", f"--{BOUNDARY}--\r\n".encode())[0], 422)
    for method, path in (("GET", file), ("DELETE", f"/documents/{document['id']}"), ("GET", "/documents")):
        require(f"{method} by a stranger", client.send(method, path, token="other")[0], 401)  # noqa: S106

    require("the delete", client.send("DELETE", f"/documents/{document['id']}")[0], 204)
    require("the download of a deleted file", client.send("GET", file)[0], 404)
    end = time.monotonic() + PATIENCE
    while stored_files() and time.monotonic() < end:
        time.sleep(0.1)
    require("the folder after the delete", stored_files(), [])


def main(readme: Path) -> None:
    require_installed_package()
    if left := [path.name for path in Path().iterdir()]:
        sys.exit(f"the folder is not empty: {left}")
    (program, *_) = re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)
    Path("app.py").write_text(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("uvicorn")), "app:app", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "TOKENS": json.dumps({TOKEN: "anna"})})
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit("the program did not start")
                time.sleep(0.1)
        use(Client(port))
    finally:
        server.terminate()
        code = server.wait(PATIENCE)
    require("the program ends when it is asked to", code in (0, -signal.SIGTERM), True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
