"""Serving and receiving files over HTTP, on Starlette and so on FastAPI; the extra `web` brings what it needs."""

from granite_storage._headers import INLINE_TYPES
from granite_storage.exceptions import MissingDependencyError

try:
    import starlette as _starlette
except ImportError as _error:
    raise MissingDependencyError("granite_storage.web needs Starlette: pip install 'granite-storage[web]'") from _error

from granite_storage.web._requests import UploadLimits
from granite_storage.web.direct import DirectUpload, DirectUploads
from granite_storage.web.errors import (
    MalformedRequestError,
    MissingFieldError,
    RequestError,
    RequestTooLargeError,
    UnsupportedRequestError,
    UploadMismatchError,
    UploadMissingError,
    UploadTokenError,
    install_error_handlers,
    problem_response,
)
from granite_storage.web.responses import Offload, StoredObjectResponse
from granite_storage.web.uploads import (
    FileList,
    FilePart,
    FileTarget,
    FormFields,
    FormFiles,
    PolicyTarget,
    Target,
    UploadDependency,
    UploadForm,
    stream_body,
    stream_upload,
    upload_body,
    upload_form,
)
from granite_storage.web.urls import PublicFiles, SignedFiles

__all__ = [
    "INLINE_TYPES",
    "DirectUpload",
    "DirectUploads",
    "FileList",
    "FilePart",
    "FileTarget",
    "FormFields",
    "FormFiles",
    "MalformedRequestError",
    "MissingFieldError",
    "Offload",
    "PolicyTarget",
    "PublicFiles",
    "RequestError",
    "RequestTooLargeError",
    "SignedFiles",
    "StoredObjectResponse",
    "Target",
    "UnsupportedRequestError",
    "UploadDependency",
    "UploadForm",
    "UploadLimits",
    "UploadMismatchError",
    "UploadMissingError",
    "UploadTokenError",
    "install_error_handlers",
    "problem_response",
    "stream_body",
    "stream_upload",
    "upload_body",
    "upload_form",
]

del _starlette
