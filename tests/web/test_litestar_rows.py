"""Rows with attachments under Litestar: through DTOs of models, through its serialization plugin, and without either."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from advanced_alchemy.extensions.litestar import SQLAlchemyDTO, SQLAlchemySerializationPlugin
from litestar import Litestar, get, post
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, attachment, bind_storage
from tests.orm.values import Sessions, add, sqlite

pytestmark = [
    pytest.mark.case("RB-18"),
    # Its next version wants a type of its own there, which today's versions do not have.
    pytest.mark.filterwarnings("ignore:.*Reserved kwarg 'data':DeprecationWarning"),
]


class Base(DeclarativeBase):
    pass


class Paper(Base):
    __tablename__ = "paper"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    file: Mapped[Attachment | None] = attachment("papers")


PaperDTO = SQLAlchemyDTO[Paper]


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[Sessions]:
    policies = {"papers": StoragePolicy("papers", "memory")}
    binding = bind_storage(Base, StorageManager(backends={"memory": MemoryStorageBackend()}, policies=policies))
    async with sqlite(tmp_path, Base) as sessions:
        yield sessions
    binding.unbind()


@pytest.fixture(params=["dto", "plugin"])
async def client(request: pytest.FixtureRequest, sessions: Sessions) -> AsyncIterator[httpx.AsyncClient]:
    dto: dict[str, Any] = {"dto": PaperDTO, "return_dto": PaperDTO} if request.param == "dto" else {}
    stored = await add(sessions, Paper(title="one", file=Attachment(b"abc", filename="a.txt", content_type="text/plain")))
    empty = await add(sessions, Paper(title="none"))

    @get("/one", **dto)
    async def one() -> Paper:
        return stored

    @get("/all", **dto)
    async def everything() -> list[Paper]:
        return [stored, empty]

    @get("/file")
    async def file() -> dict[str, Any]:
        return {"file": stored.file}

    @post("/papers", **dto)
    async def create(data: Paper) -> Paper:
        return data

    app = Litestar(
        [one, everything, file, create],
        plugins=[SQLAlchemySerializationPlugin()] if request.param == "plugin" else [],
        type_encoders={Attachment: Attachment.describe},
        logging_config=None,
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


SHOWN = {
    "size": 3,
    "content_type": "text/plain",
    "original_filename": "a.txt",
    "checksum": "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
}


async def test_rows_show_their_files(client: httpx.AsyncClient) -> None:
    assert (await client.get("/one")).json() == {"id": 1, "title": "one", "file": SHOWN}
    assert [row["file"] for row in (await client.get("/all")).json()] == [SHOWN, None]
    assert (await client.get("/file")).json() == {"file": SHOWN}


async def test_openapi(client: httpx.AsyncClient) -> None:
    assert (await client.get("/schema/openapi.json")).status_code == 200


@pytest.mark.parametrize("sent", [SHOWN, "text", {"location": "papers/x", "backend": "memory"}])
async def test_none_comes_from_a_client(client: httpx.AsyncClient, sent: Any) -> None:
    answer = await client.post("/papers", json={"id": 3, "title": "t", "file": sent})
    assert (answer.status_code, answer.json()) == (201, {"id": 3, "title": "t", "file": None})
