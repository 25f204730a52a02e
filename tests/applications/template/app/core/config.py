import os


class Settings:
    API_V1_STR = "/api/v1"
    SECRET_KEY = "secret-of-the-tests"
    ACCESS_TOKEN_EXPIRE_SECONDS = 60 * 60 * 24 * 8
    FIRST_SUPERUSER = "admin@example.com"
    FIRST_SUPERUSER_PASSWORD = "superuser-password"

    @property
    def SQLALCHEMY_DATABASE_URI(self) -> str:  # noqa: N802
        return os.environ["DATABASE_URL"]


settings = Settings()
