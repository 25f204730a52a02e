import httpx
import pytest
from granite_storage.backends.memory import MemoryStorageBackend

from app import documents

pytestmark = pytest.mark.anyio
PDF = b"%PDF-1.7\n%%EOF"


async def upload(client: httpx.AsyncClient, content: bytes, name: str) -> str:
    answer = await client.post("/documents", files={"files": (name, content)})
    assert answer.status_code == 201
    (document,) = answer.json()
    assert document["file"]["size"] == len(content)
    return f"/documents/{document['id']}"


async def locations(files: dict[str, MemoryStorageBackend]) -> list[str]:
    return [
        info.location
        for backend in files.values()
        async for info in backend.iter_objects("")
    ]


async def test_permissions(anna: httpx.AsyncClient, ben: httpx.AsyncClient) -> None:
    url = await upload(ben, PDF, "plan.pdf")
    other = await upload(anna, PDF, "report.pdf")
    assert (await ben.get(f"{other}/file")).status_code == 404
    assert (await anna.get(f"{url}/file")).content == PDF  # an administrator
    shared = await anna.put(f"{other}/sharing", params={"is_shared": True})
    assert shared.status_code == 204
    assert (await ben.get(f"{other}/file")).content == PDF
    assert (await ben.delete(other)).status_code == 403
    assert len((await ben.get("/documents")).json()) == 2


async def test_thumbnails(anna: httpx.AsyncClient, picture: bytes) -> None:
    url = await upload(anna, picture, "photo.png")
    thumb = await anna.get(f"{url}/thumb")
    assert thumb.headers["content-type"] == "image/webp"
    paper = await upload(anna, PDF, "report.pdf")
    assert (await anna.get(f"{paper}/thumb")).status_code == 404


async def test_files_go_with_their_rows(
    anna: httpx.AsyncClient,
    ben: httpx.AsyncClient,
    files: dict[str, MemoryStorageBackend],
) -> None:
    await upload(ben, PDF, "plan.pdf")
    assert len(await locations(files)) == 1
    user = (await ben.get("/me")).json()["id"]
    assert (await ben.delete(f"/users/{user}")).status_code == 403
    assert (await anna.delete(f"/users/{user}")).status_code == 204
    # Until the outer transaction ends, a rollback could still restore the row.
    assert len(await locations(files)) == 1


async def test_a_failure_leaves_nothing(
    anna: httpx.AsyncClient,
    files: dict[str, MemoryStorageBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**values: object) -> None:
        raise RuntimeError("the database is gone")

    monkeypatch.setattr(documents, "Document", fail)
    with pytest.raises(RuntimeError):
        await anna.post("/documents", files={"files": ("a.pdf", PDF)})
    assert await locations(files) == []
