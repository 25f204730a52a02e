import argparse
import asyncio
import secrets

from .database import engine, sessions
from .models import User
from .users import hash_token


async def create_user(email: str, is_admin: bool) -> str:
    token = secrets.token_urlsafe(32)
    user = User(email=email, token_hash=hash_token(token), is_admin=is_admin)
    async with sessions.begin() as session:
        session.add(user)
    await engine.dispose()
    return token


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("email")
    parser.add_argument("--admin", action="store_true")
    options = parser.parse_args()
    print(asyncio.run(create_user(options.email, options.admin)))
