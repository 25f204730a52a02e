"""`ls`, `stat` and `cp`: the objects of a backend, without the rows."""

from __future__ import annotations

import asyncio
import mimetypes
import os
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import IO, Any

import click

from granite_storage._tasks import shielded, shielded_cleanup
from granite_storage.backends._resuming import open_resuming
from granite_storage.backends.base import ObjectInfo, ObjectReader, closing_listing
from granite_storage.cli.output import format_size
from granite_storage.cli.runtime import JSON, CommandContext, Exit, command, usage_of
from granite_storage.exceptions import BackendError, ObjectNotFoundError
from granite_storage.locations import check_location, uuid7_hex
from granite_storage.manager import StorageManager

_CHUNK = 1 << 20


@command("ls")
@click.argument("address", required=False)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Stop after N objects.")
@JSON
async def ls_command(context: CommandContext, address: str | None, limit: int | None) -> None:
    """List objects, as size, time and location.

    ADDRESS is BACKEND: or BACKEND:PREFIX, where the prefix is characters and not segments. Without one it lists the policies and
    the backends they write to.
    """
    if address is None:
        _list_policies(context)
        return
    key, prefix = _address(address, context.binding.manager)
    with usage_of(f"the prefix {prefix!r}"):
        check_location(f"{prefix}x")  # a prefix of nothing but locations that cannot be would list nothing
    number = 0
    async with closing_listing(context.binding.manager.backend(key).iter_objects(prefix)) as objects:
        async for info in objects:
            text = f"{format_size(info.size):>9}  {info.modified:%Y-%m-%d %H:%M:%S}  {info.location}"
            context.output.item(_facts(info), text)
            number += 1
            if number == limit:
                return


def _list_policies(context: CommandContext) -> None:
    manager = context.binding.manager
    rows = [(policy.storage_key, policy.backend_key, policy.key_prefix or "") for policy in manager.policies.values()]
    unused = sorted(set(manager.backends) - {backend for _, backend, _ in rows})
    if context.output.as_json:
        for storage_key, backend, prefix in rows:
            context.output.record({"storage_key": storage_key, "backend": backend, "key_prefix": prefix or None})
        for backend in unused:
            context.output.record({"storage_key": None, "backend": backend, "key_prefix": None})
        return
    context.output.table(["policy", "backend", "prefix"], [*rows, *(("-", backend, "") for backend in unused)])


def _facts(info: ObjectInfo) -> dict[str, Any]:
    return {
        "location": info.location,
        "size": info.size,
        "modified": info.modified.isoformat(),
        "etag": info.etag,
        "content_type": info.content_type,
    }


@command("stat")
@click.argument("address")
@JSON
async def stat_command(context: CommandContext, address: str) -> Exit | None:
    """Show what a backend knows of an object.

    ADDRESS is BACKEND:LOCATION. The exit code is 1 where there is no object.
    """
    key, location = _object_address(address, context.binding.manager)
    try:
        info = await context.binding.manager.backend(key).stat(location)
    except ObjectNotFoundError:
        return _note_missing(context, key, location)
    if context.output.as_json:
        context.output.record({"backend": key, **_facts(info)})
    else:
        facts = {name.replace("_", " "): value for name, value in _facts(info).items() if value is not None}
        context.output.facts({"backend": key, **facts, "size": f"{info.size:,} bytes ({format_size(info.size)})"})
    return None


def _note_missing(context: CommandContext, key: str, location: str) -> Exit:
    context.output.note(f"no object exists at {key}:{location}", "red")
    return Exit.FOUND


@command("cp")
@click.argument("source")
@click.argument("target")
@click.option("--force", is_flag=True, help="Overwrite the target file.")
@click.option("--model", "model_name", default="import", metavar="NAME", help="For a new object: the kind of its owner.")
@click.option("--entity", "entity_id", metavar="ID", help="For a new object: the id of its owner.  [default: a new UUID]")
@click.option("--field", "field_name", default="file", metavar="NAME", help="For a new object: the name of the owner's field.")
@click.option("--content-type", metavar="TYPE", help="For a new object.  [default: by the file's name]")
async def cp_command(
    context: CommandContext,
    source: str,
    target: str,
    force: bool,
    model_name: str,
    entity_id: str | None,
    field_name: str,
    content_type: str | None,
) -> Exit | None:
    """Copy an object out to a file, or a file in to a new object.

    \b
      granite-storage cp disk:documents/document/1/file/0199...-a.pdf a.pdf
      granite-storage cp a.pdf documents:

    Out: SOURCE is BACKEND:LOCATION, TARGET a file, a folder, or - for the standard output. The file appears when it is complete.

    In: TARGET is the name of a policy and a colon, with nothing behind it: the location is generated. The new object's ref is
    printed as JSON. No row refers to it: store the ref in a plain column of refs, or the garbage collector deletes the object
    after its grace period.

    A file whose name has a colon is written as ./a:b.
    """  # noqa: D301  # click wants the backspace
    manager = context.binding.manager
    if _leads_to(source, manager.backends) and not _leads_to(target, manager.policies):
        key, location = _object_address(source, manager)
        try:
            await _copy_out(context, key, location, target, force=force)
        except ObjectNotFoundError:
            return _note_missing(context, key, location)
    elif _leads_to(target, manager.policies):
        storage_key, _, rest = target.partition(":")
        if rest:
            raise click.UsageError(
                f"the location of a new object is generated, and cannot be {rest!r}: write {storage_key}: alone, and --model,"
                " --entity and --field for its parts"
            )
        names = {"model_name": model_name, "entity_id": entity_id or uuid7_hex(), "field_name": field_name}
        await _copy_in(context, Path(source), storage_key, content_type, names)
    else:
        raise click.UsageError(
            f"SOURCE or TARGET must be an object: BACKEND:LOCATION to copy from ({', '.join(sorted(manager.backends))}),"
            f" or POLICY: to copy to ({', '.join(sorted(manager.policies))})"
        )
    return None


async def _copy_out(context: CommandContext, key: str, location: str, target: str, *, force: bool) -> None:
    async with aclosing(await open_resuming(context.binding.manager.backend(key), location)) as reader:
        if target == "-":
            await _pump(context, reader, context.output.raw)
            return
        path = Path(target)
        if await asyncio.to_thread(path.is_dir):
            path /= location.rpartition("/")[2]
        await _copy_to_file(context, reader, path, force=force)


async def _copy_to_file(context: CommandContext, reader: ObjectReader, path: Path, *, force: bool) -> None:
    """Write beside the target and rename it at the end; an error leaves nothing, and the target as it was."""
    if not force and await asyncio.to_thread(os.path.lexists, path):
        raise click.ClickException(f"{path} already exists: pass --force to overwrite it")
    if not await asyncio.to_thread(path.parent.is_dir):
        raise click.UsageError(f"there is no folder {path.parent}: create it, or correct TARGET")
    file = await shielded(asyncio.to_thread(_open_beside, path), undo=_discard)
    try:
        await _pump(context, reader, file)
        await shielded(asyncio.to_thread(_publish, file, path, force))
    finally:
        await shielded_cleanup(_discard(file), f"removing {file.name}")
    context.output.note(f"{format_size(reader.info.size)} written to {path}")


async def _pump(context: CommandContext, reader: ObjectReader, file: IO[bytes]) -> None:
    size, done = reader.info.size, 0
    with context.output.progress("copying", size, "bytes") as bar:
        while chunk := await reader.read(_CHUNK):
            await asyncio.to_thread(file.write, chunk)
            done += len(chunk)
            bar.reach(done)
    await asyncio.to_thread(file.flush)
    if done != size:
        raise BackendError(f"only {done} of the {size} bytes of {reader.info.location!r} could be read: run the command again")


def _open_beside(path: Path) -> IO[bytes]:
    return tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.", delete=False)


def _publish(file: IO[bytes], path: Path, force: bool) -> None:
    os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(file.fileno(), 0o666 & ~mask)
    if force:
        os.replace(file.name, path)
        return
    try:
        os.link(file.name, path)
    except FileExistsError:
        raise click.ClickException(f"{path} already exists: pass --force to overwrite it") from None


async def _discard(file: IO[bytes]) -> None:
    await asyncio.to_thread(file.close)
    await asyncio.to_thread(Path(file.name).unlink, missing_ok=True)


async def _copy_in(
    context: CommandContext, path: Path, storage_key: str, content_type: str | None, names: dict[str, Any]
) -> None:
    # Its first call reads the tables of the system.
    guessed = content_type or (await asyncio.to_thread(mimetypes.guess_type, path.name))[0]
    try:
        file = await asyncio.to_thread(path.open, "rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        found = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
        raise click.UsageError(f"SOURCE must be a file, and {str(path)!r} {found}") from error
    try:
        ref = await context.binding.manager.put_stream(
            storage_key=storage_key, stream=file, content_type=guessed, original_filename=path.name, **names
        )
    finally:
        await asyncio.to_thread(file.close)
    context.output.record(ref.to_dict())
    context.output.note(
        "no row refers to it yet: store this ref in one, or the garbage collector deletes the object after its grace period"
    )


def _leads_to(address: str, keys: Any) -> bool:
    key, colon, _ = address.partition(":")
    return bool(colon) and key in keys


def _address(address: str, manager: StorageManager) -> tuple[str, str]:
    key, _, rest = address.partition(":")
    with usage_of(f"the address {address!r}"):
        manager.backend(key)
    return key, rest


def _object_address(address: str, manager: StorageManager) -> tuple[str, str]:
    key, location = _address(address, manager)
    if not location:
        raise click.UsageError(f"{address!r} has no location: write BACKEND:LOCATION")
    with usage_of(f"the address {address!r}"):
        check_location(location)
    return key, location
