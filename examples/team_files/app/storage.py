from granite_storage import StorageBackend, StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.inspection import ImageLimits

from . import settings

MIB = 1024 * 1024
LIMITS = ImageLimits(max_pixels=50_000_000)

backends: dict[str, StorageBackend] = {"disk": LocalStorageBackend(settings.FILES)}
if settings.BUCKET is not None:
    backends["s3"] = S3StorageBackend(bucket=settings.BUCKET)
backend_key = "disk" if settings.BUCKET is None else "s3"

storage = StorageManager(
    backends=backends,
    policies={
        "avatars": StoragePolicy(
            "avatars",
            backend_key,
            max_size=2 * MIB,
            key_prefix="avatars",
            accept=("image/jpeg", "image/png", "image/webp"),
            inspect=[LIMITS],
            strip="location",
        ),
        "documents": StoragePolicy(
            "documents",
            backend_key,
            max_size=50 * MIB,
            key_prefix="documents",
            accept=("image/*", "application/pdf", "text/plain"),
            inspect=[LIMITS],
            strip="location",
        ),
    },
)
