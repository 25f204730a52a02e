import os
import uuid
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from sqlmodel import Session, col, delete, update

from app.core.config import settings
from app.models import User
from granite_storage import Attachment

USERS = f"{settings.API_V1_STR}/users"
Headers = dict[str, str]


def upload(client: TestClient, headers: Headers, content: bytes, name: str = "me.png") -> Any:
    return client.put(f"{USERS}/me/avatar", headers=headers, files={"file": (name, content, "image/png")})


def stored(user_id: str) -> list[bytes]:
    folder = Path(os.environ["STORAGE_FOLDER"], "avatars/user", user_id)
    return sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_upload_replace_download_delete(client: TestClient, new_user: Headers, normal_user_token_headers: Headers) -> None:
    avatar = f"{USERS}/{new_user['id']}/avatar"
    assert client.get(f"{USERS}/me", headers=normal_user_token_headers).json()["avatar"] is None
    shown = upload(client, normal_user_token_headers, b"first").json()["avatar"]
    assert (shown["size"], shown["content_type"], shown["original_filename"]) == (5, "image/png", "me.png")
    assert "location" not in shown
    upload(client, normal_user_token_headers, b"second")
    assert stored(new_user["id"]) == [b"second"]
    answer = client.get(avatar, headers=normal_user_token_headers)
    assert (answer.content, answer.headers["content-type"]) == (b"second", "image/png")
    assert client.delete(f"{USERS}/me/avatar", headers=normal_user_token_headers).status_code == 200
    assert client.get(avatar, headers=normal_user_token_headers).status_code == 404
    assert stored(new_user["id"]) == []


def test_deleting_the_user_removes_the_object(
    client: TestClient, new_user: Headers, normal_user_token_headers: Headers, superuser_token_headers: Headers
) -> None:
    upload(client, normal_user_token_headers, b"avatar")
    assert client.delete(f"{USERS}/{new_user['id']}", headers=superuser_token_headers).status_code == 200
    assert stored(new_user["id"]) == []


def test_deleting_oneself_removes_the_object(client: TestClient, new_user: Headers, normal_user_token_headers: Headers) -> None:
    upload(client, normal_user_token_headers, b"avatar")
    assert client.delete(f"{USERS}/me", headers=normal_user_token_headers).status_code == 200
    assert stored(new_user["id"]) == []


def test_other_changes_keep_the_avatar(client: TestClient, new_user: Headers, superuser_token_headers: Headers) -> None:
    headers = {"Authorization": new_user["Authorization"]}
    upload(client, headers, b"avatar")
    data = {"full_name": "Another", "password": "new-password"}
    client.patch(f"{USERS}/{new_user['id']}", headers=superuser_token_headers, json=data).raise_for_status()
    client.patch(f"{USERS}/me", headers=headers, json={"full_name": "A third"}).raise_for_status()
    assert stored(new_user["id"]) == [b"avatar"]


def test_a_large_avatar(client: TestClient, new_user: Headers, normal_user_token_headers: Headers) -> None:
    assert upload(client, normal_user_token_headers, bytes(1024 * 1024 + 1)).status_code == 413
    assert stored(new_user["id"]) == []


def test_no_client_sets_an_avatar(client: TestClient, new_user: Headers, superuser_token_headers: Headers) -> None:
    data = {"avatar": {"backend": "local", "location": "avatars/user/1/file/x"}, "full_name": "A name"}
    updated = client.patch(f"{USERS}/{new_user['id']}", headers=superuser_token_headers, json=data)
    assert (updated.json()["avatar"], updated.json()["full_name"]) == (None, "A name")


def test_rollback_and_bulk_statements(db: Session, new_user: Headers) -> None:
    user = db.get_one(User, uuid.UUID(new_user["id"]))
    user.avatar = Attachment(b"in vain")
    db.flush()
    db.rollback()
    assert stored(new_user["id"]) == []
    user.avatar = Attachment(b"kept")
    db.commit()
    mine = col(User.id) == user.id
    db.execute(update(User).where(mine).values(full_name="In bulk"))
    db.commit()
    assert stored(new_user["id"]) == [b"kept"]
    db.execute(delete(User).where(mine))
    db.commit()
    assert stored(new_user["id"]) == []


def test_left_for_the_end(client: TestClient, normal_user_token_headers: Headers) -> None:
    """The fixture `db` deletes all users when the tests have run, and their objects with them."""
    upload(client, normal_user_token_headers, b"left").raise_for_status()
