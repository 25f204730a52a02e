"""The conformance suite that `docs/testing.md` shows passes, as a test module with nothing else in it would."""

import re
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs/testing.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

(source,) = (block for block in BLOCK.findall(DOCUMENT.read_text()) if "class TestMyBackend(" in block)
module: dict[str, Any] = {"__name__": __name__}
exec(compile(source, DOCUMENT, "exec"), module)  # noqa: S102  # the project's own document
TestMyBackend = module["TestMyBackend"]
