"""Uploads are judged before they are kept: by type, by inspectors such as `ImageLimits`, and by a virus scanner."""

from __future__ import annotations

from granite_storage.inspection.base import Inspection, Inspector, Scanner, ScanResult, UploadPreview
from granite_storage.inspection.clamd import ClamdScanner
from granite_storage.inspection.images import ImageLimits

__all__ = ["ClamdScanner", "ImageLimits", "Inspection", "Inspector", "ScanResult", "Scanner", "UploadPreview"]
