import uuid

from fastapi.testclient import TestClient
from sqlmodel import Session

from app.core.config import settings
from app.models import User

USERS = f"{settings.API_V1_STR}/users"
Headers = dict[str, str]


def test_get_users_superuser_me(client: TestClient, superuser_token_headers: Headers) -> None:
    current_user = client.get(f"{USERS}/me", headers=superuser_token_headers).json()
    assert current_user["is_superuser"]
    assert current_user["email"] == settings.FIRST_SUPERUSER


def test_wrong_password_and_token(client: TestClient) -> None:
    data = {"username": settings.FIRST_SUPERUSER, "password": "wrong"}
    assert client.post(f"{settings.API_V1_STR}/login/access-token", data=data).status_code == 400
    assert client.get(f"{USERS}/me", headers={"Authorization": "Bearer nothing"}).status_code == 403
    assert client.get(f"{USERS}/me").status_code == 401


def test_create_user_twice(client: TestClient, superuser_token_headers: Headers) -> None:
    data = {"email": f"{uuid.uuid4().hex}@example.com", "password": "a-password"}
    created = client.post(f"{USERS}/", headers=superuser_token_headers, json=data)
    assert created.status_code == 200
    assert client.post(f"{USERS}/", headers=superuser_token_headers, json=data).status_code == 400
    assert "hashed_password" not in created.json()


def test_permissions(client: TestClient, new_user: Headers, normal_user_token_headers: Headers) -> None:
    data = {"email": "x@example.com", "password": "a-password"}
    assert client.post(f"{USERS}/", headers=normal_user_token_headers, json=data).status_code == 403
    assert client.get(f"{USERS}/", headers=normal_user_token_headers).status_code == 403
    assert client.get(f"{USERS}/{uuid.uuid4()}", headers=normal_user_token_headers).status_code == 403
    assert client.delete(f"{USERS}/{new_user['id']}", headers=normal_user_token_headers).status_code == 403


def test_retrieve_users(client: TestClient, new_user: Headers, superuser_token_headers: Headers) -> None:
    found = client.get(f"{USERS}/", headers=superuser_token_headers).json()
    assert found["count"] >= 2
    assert new_user["email"] in [user["email"] for user in found["data"]]


def test_update_user_me(client: TestClient, db: Session, normal_user_token_headers: Headers) -> None:
    data = {"full_name": "Updated Name"}
    updated = client.patch(f"{USERS}/me", headers=normal_user_token_headers, json=data).json()
    user = db.get(User, uuid.UUID(updated["id"]))
    assert user
    assert user.full_name == "Updated Name"
    data = {"email": settings.FIRST_SUPERUSER}
    assert client.patch(f"{USERS}/me", headers=normal_user_token_headers, json=data).status_code == 409


def test_update_user(client: TestClient, new_user: Headers, superuser_token_headers: Headers) -> None:
    data = {"full_name": "By a superuser", "password": "new-password"}
    updated = client.patch(f"{USERS}/{new_user['id']}", headers=superuser_token_headers, json=data)
    assert updated.json()["full_name"] == "By a superuser"
    assert client.patch(f"{USERS}/{uuid.uuid4()}", headers=superuser_token_headers, json=data).status_code == 404


def test_delete_user_me(client: TestClient, db: Session, new_user: Headers, normal_user_token_headers: Headers) -> None:
    item = client.post(f"{settings.API_V1_STR}/items/", headers=normal_user_token_headers, json={"title": "An item"})
    assert item.status_code == 200
    assert client.delete(f"{USERS}/me", headers=normal_user_token_headers).status_code == 200
    assert db.get(User, uuid.UUID(new_user["id"])) is None
    assert client.get(f"{USERS}/me", headers=normal_user_token_headers).status_code == 404


def test_delete_user_super_user(
    client: TestClient, new_user: Headers, normal_user_token_headers: Headers, superuser_token_headers: Headers
) -> None:
    client.post(f"{settings.API_V1_STR}/items/", headers=normal_user_token_headers, json={"title": "An item"})
    assert client.delete(f"{USERS}/{new_user['id']}", headers=superuser_token_headers).status_code == 200
    assert client.delete(f"{USERS}/{new_user['id']}", headers=superuser_token_headers).status_code == 404
    me = client.get(f"{USERS}/me", headers=superuser_token_headers).json()
    assert client.delete(f"{USERS}/{me['id']}", headers=superuser_token_headers).status_code == 403


def test_items(client: TestClient, normal_user_token_headers: Headers, superuser_token_headers: Headers) -> None:
    items = f"{settings.API_V1_STR}/items"
    item = client.post(f"{items}/", headers=superuser_token_headers, json={"title": "An item"}).json()
    assert client.get(f"{items}/{item['id']}", headers=normal_user_token_headers).status_code == 403
    assert client.get(f"{items}/{item['id']}", headers=superuser_token_headers).json() == item
    assert client.delete(f"{items}/{item['id']}", headers=superuser_token_headers).status_code == 200
