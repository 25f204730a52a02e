"""What a finish token is for: one column of one application, and no other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ConfigurationError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, attachment, bind_storage
from granite_storage.web import DirectUploads, UploadTokenError, problem_response
from tests.web.direct_uploads import client_of, uploads_of
from tests.web.receiving import stored_in


class Base(DeclarativeBase):
    pass


class OtherBase(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    avatar: Mapped[Attachment | None] = attachment("avatars")
    letter: Mapped[Attachment | None] = attachment("letters")
    other_letter: Mapped[Attachment | None] = attachment("letters")


class Letter(Base):
    __tablename__ = "letter"
    id: Mapped[int] = mapped_column(primary_key=True)
    letter: Mapped[Attachment | None] = attachment("letters")


class Twin(OtherBase):
    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    letter: Mapped[Attachment | None] = attachment("letters")


@pytest.fixture
async def manager() -> AsyncIterator[StorageManager]:
    policies = {
        "avatars": StoragePolicy("avatars", "store", max_size=1000),
        "letters": StoragePolicy("letters", "store", max_size=5_000_000),
    }
    async with StorageManager(backends={"store": MemoryStorageBackend()}, policies=policies) as manager:
        yield manager


@pytest.fixture
def binding(manager: StorageManager) -> Any:
    binding = bind_storage(Base, manager)
    yield binding
    binding.unbind()


async def sent_letter(uploads: DirectUploads) -> str:
    """Begin 5,000,000 bytes of a page for letters, and send them."""
    async with client_of(uploads) as client:
        upload = await uploads.begin(Person.letter, filename="a.html", content_type="text/html", owner="anna")
        await client.sent(upload, b"<script>".ljust(5_000_000))
        return upload.token


async def refused(uploads: DirectUploads, token: str, attribute: Any, owner: str | None = "anna") -> None:
    with pytest.raises(UploadTokenError) as raised:
        await uploads.finish(token, attribute, owner=owner)
    assert problem_response(raised.value).status_code == 403


@pytest.mark.case("RE-05")
async def test_another_column(manager: StorageManager, binding: Any) -> None:
    uploads = uploads_of(binding)
    token = await sent_letter(uploads)
    for attribute in (Person.avatar, Person.other_letter, Letter.letter):
        await refused(uploads, token, attribute)
    for owner in (None, "bert"):
        await refused(uploads, token, Person.letter, owner)
    assert len(await stored_in(manager)) == 1
    assert (await uploads.finish(token, Person.letter, owner="anna")).size == 5_000_000


@pytest.mark.case("RE-05")
async def test_another_base_with_the_same_secret(manager: StorageManager, binding: Any) -> None:
    """Its table and column have the same names, and its objects the same places."""
    token = await sent_letter(uploads_of(binding))
    twin = bind_storage(OtherBase, manager)
    try:
        await refused(uploads_of(twin), token, Twin.letter)
        with pytest.raises(ConfigurationError, match="attachment attribute"):
            await uploads_of(twin).finish(token, Person.letter, owner="anna")
    finally:
        twin.unbind()


@pytest.mark.case("RE-05")
async def test_another_application_with_the_same_secret(manager: StorageManager, binding: Any) -> None:
    token = await sent_letter(uploads_of(binding, audience="https://a.example"))
    for other in ("https://b.example", "", None):
        await refused(uploads_of(binding, audience=other), token, Person.letter)
    assert await uploads_of(binding, audience="https://a.example").finish(token, Person.letter, owner="anna")


@pytest.mark.case("RE-05")
async def test_a_url_of_another_application(binding: Any) -> None:
    mine, other = uploads_of(binding, audience="a"), uploads_of(binding, audience="b")
    upload = await mine.begin(Person.letter)
    async with client_of(other) as client:
        assert (await client.send(upload)).status_code == 403
    async with client_of(mine) as client:
        assert (await client.send(upload)).status_code == 204


async def test_what_is_no_audience(binding: Any) -> None:
    for wrong in (b"x", 7, ["x"]):
        with pytest.raises(ConfigurationError, match="audience"):
            uploads_of(binding, audience=wrong)


async def test_what_is_no_attachment(binding: Any) -> None:
    uploads = uploads_of(binding)
    token = await sent_letter(uploads)
    for wrong in (Person.id, Person, "letter", None, Twin.letter):
        with pytest.raises(ConfigurationError, match="attachment attribute"):
            await uploads.finish(token, wrong, owner="anna")  # type: ignore[arg-type]
