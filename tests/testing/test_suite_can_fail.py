"""The suite fails where a promise is broken, at a case that names it, and says what was broken."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.tiers import is_exhaustive

Failures = Mapping[str, Mapping[str, str]]

EXPECTED = [
    ("Overwrites", "test_never_overwrites[put_bytes-small]", "put_bytes to a location that has an object must be refused"),
    ("EndsShort", "test_range", "got 500 bytes, expected 1000"),
    ("EndsShort", "test_round_trip[parts-put_bytes]", "got 500 bytes"),
    ("PublishesEarly", "test_unfinished_write_is_invisible[small]", "while its stream has not ended: exists() says"),
    ("PublishesEarly", "test_source_raises[ChecksumMismatchError-small]", "after its stream raised"),
    ("ReopensAnything", "test_reopened_reader", "opened again on another object, and says that it is the same"),
    ("BlindToFolders", "test_prefix", "a listing below 'a/' is not what begins so"),
    ("SwallowsCancellation", "test_cancelled_write[put_stream-small-at once]", "the cancellation was swallowed"),
    ("SwallowsCancellation", "test_timeout", "asyncio.timeout must end a write"),
    ("HidesRefusal", "test_refused_permission[open]", "ObjectNotFoundError"),
    ("HidesRefusal", "test_refused_permission[put_bytes]", "put_bytes without permission must be refused"),
    ("IgnoresOptions", "test_undeclared_option[put_bytes]", "put_bytes with an unknown option must raise"),
    ("KeepsAnAbilityQuiet", "test_declared_ability[supports_copy-SupportsCopy-copy]", "supports_copy is not declared"),
    ("PretendsAnAbility", "test_declared_ability[supports_presign-SupportsPresign-presign_get]", "has no presign_get()"),
    ("WrapsSourceErrors", "test_source_raises[ConnectionResetError-small]", "the stream's error must come out"),
    ("ForgetsTheZone", "test_stat", "stat() gives a time without a zone"),
    ("LeavesTasks", "test_timeout", "tasks were left running"),
    ("BoundToOneLoop", "test_event_loops_one_after_the_other", "attached to a different loop"),
    ("KeepsIdsQuiet", "test_upload_tells_its_id", "a multipart upload must tell its id once, but told []"),
    ("AbortsNothing", "test_aborted_upload[by its id]", "after an upload was aborted by its id must fail"),
    ("AbortsNothing", "test_upload_tells_its_id", "a write by one request told the id of an upload"),
    ("TrustsLocations", "test_hostile_location[path]", "delete_many '' must be refused"),
    ("TrustsLocations", "test_batch_with_a_hostile_location", "a batch with an unsafe location must be refused"),
    ("WithoutHooks", "test_page_sizes[1]", "must override `with_page_size`, or declare `has_pages = False`"),
    ("WithoutHooks", "test_full_store[put_bytes]", "must override `with_room_for`, or declare `can_be_full = False`"),
    ("WithoutHooks", "test_killed_writer", "must override `elsewhere`, or declare `is_shared = False`"),
    ("WithoutBackend", "test_stat", "TestWithoutBackend must override the fixture `backend`"),
]

IN_FULL = [
    "Sound",
    "BlindToFolders",
    *(["IgnoresOptions", "KeepsAnAbilityQuiet", "WrapsSourceErrors"] if is_exhaustive() else []),
]
"""Those that run through the whole suite, and not only the case that must fail."""


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """What fails, and with which words, by class and test, when the broken backends run through the suite."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copy(Path(__file__).with_name("broken_backends.py"), folder)
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    cases = [f"broken_backends.py::Test{suite}::{case}" for suite, case, _ in EXPECTED if suite not in IN_FULL]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *cases, *(f"broken_backends.py::Test{suite}" for suite in IN_FULL)],
        capture_output=True,
        timeout=250,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert run.returncode == 1, run.stdout.decode()[-3000:] + run.stderr.decode()
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):  # noqa: S314  # pytest wrote it
        for problem in (*case.findall("failure"), *case.findall("error")):
            suite = case.attrib["classname"].rpartition(".Test")[2]
            found.setdefault(suite, {})[case.attrib["name"]] = problem.attrib["message"]
    return found


@pytest.mark.parametrize(("suite", "case", "words"), EXPECTED, ids=[f"{suite}-{case}" for suite, case, _ in EXPECTED])
def test_broken_promise_is_named(failures: Failures, suite: str, case: str, words: str) -> None:
    assert case in failures.get(suite, {}), f"{suite} passed {case}; it failed {sorted(failures.get(suite, {}))}"
    message = failures[suite][case]
    assert words in message, f"{suite} failed {case}, but in other words: {message}"


def test_sound_backend_passes(failures: Failures) -> None:
    assert "Sound" not in failures, failures["Sound"]


def test_a_quiet_flaw_fails_little(failures: Failures) -> None:
    """One broken promise fails the cases about it, and not the whole suite: the message points at it."""
    for suite in IN_FULL[1:]:
        names = {re.sub(r"\[.*", "", case) for case in failures[suite]}
        assert len(names) <= 4, f"{suite} fails {sorted(names)}"
