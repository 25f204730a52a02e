import uuid

from sqlmodel import Session

from app import crud
from app.core.security import verify_password
from app.models import User, UserCreate, UserUpdate


def create(db: Session, **fields: object) -> User:
    user_in = UserCreate(email=f"{uuid.uuid4().hex}@example.com", password="a-password", **fields)  # type: ignore[arg-type]
    return crud.create_user(session=db, user_create=user_in)


def test_create_user(db: Session) -> None:
    user = create(db)
    assert verify_password("a-password", user.hashed_password)
    assert user.is_active
    assert not user.is_superuser


def test_authenticate_user(db: Session) -> None:
    user = create(db)
    assert crud.authenticate(session=db, email=user.email, password="a-password") == user
    assert crud.authenticate(session=db, email=user.email, password="another") is None
    assert crud.authenticate(session=db, email="nobody@example.com", password="a-password") is None


def test_update_user(db: Session) -> None:
    user = create(db, is_superuser=True)
    crud.update_user(session=db, db_user=user, user_in=UserUpdate(password="new-password", is_superuser=True))
    found = db.get(User, user.id)
    assert found
    assert verify_password("new-password", found.hashed_password)


def test_delete_user(db: Session) -> None:
    user = create(db)
    identifier = user.id
    db.delete(user)
    db.commit()
    assert db.get(User, identifier) is None
