import hashlib
import hmac
import os

from itsdangerous import URLSafeTimedSerializer

from app.core.config import settings

_serializer = URLSafeTimedSerializer(settings.SECRET_KEY)


def create_access_token(subject: str) -> str:
    return _serializer.dumps(subject)


def read_access_token(token: str) -> str:
    return str(_serializer.loads(token, max_age=settings.ACCESS_TOKEN_EXPIRE_SECONDS))


def get_password_hash(password: str) -> str:
    salt = os.urandom(16)
    return f"{salt.hex()}${_hash(password, salt)}"


def verify_password(plain_password: str, hashed_password: str) -> bool:
    salt, _, expected = hashed_password.partition("$")
    return hmac.compare_digest(_hash(plain_password, bytes.fromhex(salt)), expected)


def _hash(password: str, salt: bytes) -> str:
    return hashlib.scrypt(password.encode(), salt=salt, n=2**10, r=8, p=1).hex()
