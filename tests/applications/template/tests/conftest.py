import uuid
from collections.abc import Generator

import pytest
from fastapi.testclient import TestClient
from sqlmodel import Session, delete

from app.core.config import settings
from app.core.db import engine, init_db
from app.main import app
from app.models import Item, User


@pytest.fixture(scope="session", autouse=True)
def db() -> Generator[Session, None, None]:
    with Session(engine) as session:
        init_db(session)
        yield session
        session.execute(delete(Item))
        session.execute(delete(User))
        session.commit()
    engine.dispose()


@pytest.fixture(scope="module")
def client() -> Generator[TestClient, None, None]:
    with TestClient(app) as client:
        yield client


def login(client: TestClient, email: str, password: str) -> dict[str, str]:
    data = {"username": email, "password": password}
    response = client.post(f"{settings.API_V1_STR}/login/access-token", data=data)
    return {"Authorization": f"Bearer {response.json()['access_token']}"}


@pytest.fixture(scope="module")
def superuser_token_headers(client: TestClient) -> dict[str, str]:
    return login(client, settings.FIRST_SUPERUSER, settings.FIRST_SUPERUSER_PASSWORD)


@pytest.fixture
def new_user(client: TestClient) -> dict[str, str]:
    """A user who has signed up: the identifier, the email and the headers."""
    email = f"{uuid.uuid4().hex}@example.com"
    response = client.post(f"{settings.API_V1_STR}/users/signup", json={"email": email, "password": "a-password"})
    return {"id": response.json()["id"], "email": email, **login(client, email, "a-password")}


@pytest.fixture
def normal_user_token_headers(new_user: dict[str, str]) -> dict[str, str]:
    return {"Authorization": new_user["Authorization"]}
