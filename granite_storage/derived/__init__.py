"""Files derived from files: recipes for thumbnails, previews and text, and the processes that make them."""

from __future__ import annotations

from granite_storage.derived.base import (
    Derivation,
    DerivationSource,
    Effect,
    EffectEvent,
    EffectHandler,
    Missing,
    Recipe,
    SupportsAccept,
    When,
)
from granite_storage.derived.functions import Derived
from granite_storage.derived.images import ImageVariant
from granite_storage.derived.pictures import ImageCandidate, Picture, PictureSource, picture, srcset
from granite_storage.derived.processes import limit_processes

__all__ = [
    "Derivation",
    "DerivationSource",
    "Derived",
    "Effect",
    "EffectEvent",
    "EffectHandler",
    "ImageCandidate",
    "ImageVariant",
    "Missing",
    "Picture",
    "PictureSource",
    "Recipe",
    "SupportsAccept",
    "When",
    "limit_processes",
    "picture",
    "srcset",
]
