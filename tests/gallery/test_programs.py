"""How the tests come by a browser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gallery.browser import Programs, programs

APT = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$1" in
  update) /bin/cp {folder}/calls {folder}/lists ;;
  install)
    [ -e {folder}/lists ] || {{ echo "Unable to locate package chromium" >&2; exit 100; }}
    for one in chromium chromedriver; do echo > {folder}/$one; /bin/chmod +x {folder}/$one; done ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with Debian's packages, root, and nothing else on the path."""
    (tmp_path / "apt-get").write_text(APT.format(folder=tmp_path))
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name in ("CI", "INSTALL_CHROMIUM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_nothing_is_installed_unasked(machine: Path) -> None:
    with pytest.raises(LookupError, match="INSTALL_CHROMIUM=1"), programs():
        pass
    assert not (machine / "calls").exists()


@pytest.mark.parametrize("variable", ["CI", "INSTALL_CHROMIUM"])
def test_what_is_missing_is_installed(machine: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    with programs() as found:
        assert found == Programs(str(machine / "chromium"), str(machine / "chromedriver"))
    install = "install -y --no-install-recommends chromium chromium-driver"
    assert (machine / "calls").read_text().splitlines() == [install, "update", install]
    with programs() as again:
        assert again == found
    assert len((machine / "calls").read_text().splitlines()) == 3


def test_a_user_installs_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LookupError), programs():
        pass
    assert not (machine / "calls").exists()


def test_what_went_wrong_is_told(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    (machine / "apt-get").write_text("#!/bin/sh\necho the disk is full >&2; exit 100\n")
    with pytest.raises(RuntimeError, match="apt-get update failed with 100: the disk is full"), programs():
        pass
