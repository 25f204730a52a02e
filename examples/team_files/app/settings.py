import os

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql+asyncpg:///team_files")
FILES = os.environ.get("FILES", "files")
BUCKET = os.environ.get("BUCKET")
