import os

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend

storage = StorageManager(
    backends={"local": LocalStorageBackend(os.environ["STORAGE_FOLDER"])},
    policies={"avatars": StoragePolicy("avatars", "local", max_size=1024 * 1024, key_prefix="avatars")},
)
