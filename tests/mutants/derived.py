"""Mutants of derived files: limits, processes, temporary files, images, digests."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_PROCESSES = "granite_storage/derived/processes.py"
_WORKER = "granite_storage/derived/_worker.py"
_PILLOW = "granite_storage/derived/_pillow.py"
_RENDERING = "granite_storage/derived/_rendering.py"
_RUNS = "tests/derived/test_processes.py"
_IMAGES = "tests/derived/test_images.py"

MUTANTS = [
    Mutant(
        name="derived-no-memory-limit",
        rule="A function has as much memory as its recipe allows.",
        path=_WORKER,
        old='resource.RLIMIT_DATA: request["max_memory"],',
        new="resource.RLIMIT_DATA: resource.RLIM_INFINITY,",
        tests=(f"{_IMAGES}::TestHostileFiles::test_memory",),
    ),
    Mutant(
        name="derived-busy-processes-outlive-the-application",
        rule="A process at work ends when the application is killed.",
        path=_WORKER,
        old=" | os.O_ASYNC)",
        new=")",
        tests=(f"{_RUNS}::TestPrograms::test_processes_end_with_an_application_that_is_killed",),
    ),
    Mutant(
        name="derived-children-stay",
        rule="The children of a process die with it.",
        path=_PROCESSES,
        old="os.killpg(self._process.pid, signal.SIGKILL)",
        new="self._process.kill()",
        tests=(f"{_RUNS}::TestFailures::test_children_die_with_their_process",),
    ),
    Mutant(
        name="derived-worn-processes-are-kept",
        rule="A process that died, or ran out of memory, serves no other call.",
        path=_PROCESSES,
        old='is_healthy = not answer.pop("is_worn", False)',
        new='is_healthy = answer.pop("is_worn", True)',
        tests=(f"{_RUNS}::TestFailures::test_each_costs_its_own_derivation",),
    ),
    Mutant(
        name="derived-cancelled-calls-go-on",
        rule="A cancelled call kills its process.",
        path=_PROCESSES,
        old="            call.cancel()\n",
        new="",
        tests=(f"{_RUNS}::TestCancellation::test_a_process_that_hangs_is_killed",),
    ),
    Mutant(
        name="derived-forked-processes-are-shared",
        rule="A forked child does not talk to its parent's processes.",
        path=_PROCESSES,
        old="os.register_at_fork(after_in_child=_forget_all)\n",
        new="",
        tests=(f"{_RUNS}::TestPrograms::test_a_forked_child_has_processes_of_its_own",),
    ),
    Mutant(
        name="derived-originals-without-bound",
        rule="A bounded number of originals lies on the disk.",
        path=_PROCESSES,
        old="asyncio.Semaphore(2 * max_processes)",
        new="asyncio.Semaphore(1000)",
        tests=(f"{_RUNS}::TestMany::test_originals_on_the_disk_are_bounded",),
    ),
    Mutant(
        name="derived-longer-originals",
        rule="An original that is longer than its receipt says is refused at the limit.",
        path=_PROCESSES,
        old="            if size > max_source:\n",
        new="            if size < 0:\n",
        tests=(f"{_RUNS}::TestSources::test_one_that_is_longer_than_it_says",),
    ),
    Mutant(
        name="derived-pixels-without-limit",
        rule="An image of too many pixels is refused before it is decoded.",
        path=_PILLOW,
        old="Image.MAX_IMAGE_PIXELS = wanted.max_pixels / 2",
        new="Image.MAX_IMAGE_PIXELS = None",
        tests=(f"{_IMAGES}::TestHostileFiles::test_one_pixel_too_many",),
    ),
    Mutant(
        name="derived-any-decoder",
        rule="The first bytes of a file decide which decoder opens it.",
        path=_PILLOW,
        old="Image.open(file, formats=[recognize(file, wanted.max_pixels)])",
        new="Image.open(file)",
        tests=(f"{_IMAGES}::TestHostileFiles::test_it_is_refused",),
    ),
    Mutant(
        name="derived-places-stay",
        rule="A derived image has no metadata.",
        path=_PILLOW,
        old="    image.info = {}  # some formats would take comments, profiles and transparency from there\n",
        new="",
        tests=(f"{_IMAGES}::TestMetadata::test_none_is_left",),
    ),
    Mutant(
        name="derived-profiles-are-dropped",
        rule="An image with a colour profile is converted to sRGB.",
        path=_PILLOW,
        old="_convert_profile(colours, profile) if profile else None",
        new="None",
        tests=(f"{_IMAGES}::TestColours::test_a_profile_is_converted",),
    ),
    Mutant(
        name="derived-images-grow",
        rule="An image is never made larger.",
        path=_RENDERING,
        old="scale = min(1.0, box[0] / width, box[1] / height)",
        new="scale = min(box[0] / width, box[1] / height)",
        tests=(f"{_IMAGES}::TestSizes::test_a_plan",),
    ),
    Mutant(
        name="derived-digests-without-the-name",
        rule="Two variants never have one digest.",
        path="granite_storage/derived/base.py",
        old="json.dumps([kind, name, parameters]",
        new="json.dumps([kind, parameters]",
        tests=("tests/derived/test_functions.py::TestDigests::test_it_knows_all_that_decides_the_content",),
    ),
    Mutant(
        name="derived-background-takes-all",
        rule="Work that no caller waits for frees its process.",
        path=_PROCESSES,
        old="asyncio.Semaphore(max(1, max_processes - 1))",
        new="asyncio.Semaphore(1000)",
        tests=(f"{_RUNS}::TestWaiting::test_the_background_leaves_a_process_to_others",),
    ),
    Mutant(
        name="derived-waits-for-ever",
        rule="A call waits for a free process as long as it may take, and no longer.",
        path=_PROCESSES,
        old="if time.monotonic() > self._deadline:",
        new="if False:",
        tests=(f"{_RUNS}::TestWaiting::test_no_process_is_free",),
    ),
    Mutant(
        name="derived-left-children-stay",
        rule="A process whose function has left a child or a thread is ended.",
        path="granite_storage/derived/_worker.py",
        old="        if _leaves_something():\n",
        new="        if False:\n",
        tests=(f"{_RUNS}::TestLeftBehind::test_a_child",),
    ),
]
