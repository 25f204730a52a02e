"""Names of media types: their aliases and extensions, and which of them are text."""

from __future__ import annotations

import mimetypes
from functools import lru_cache
from itertools import chain

from granite_storage._headers import is_active
from granite_storage.locations import clean_filename

OPAQUE = "application/octet-stream"
_UNKNOWN = ".bin"
PLAIN = "text/plain"
HTML = "text/html"
SVG = "image/svg+xml"
PDF = "application/pdf"
RTF = "application/rtf"
ZIP = "application/zip"
OLE = "application/x-ole-storage"
EXE = "application/vnd.microsoft.portable-executable"
JAR = "application/java-archive"
APK = "application/vnd.android.package-archive"
_OFFICE = "application/vnd.openxmlformats-officedocument."
DOCX, XLSX, PPTX = (
    f"{_OFFICE}{kind}" for kind in ("wordprocessingml.document", "spreadsheetml.sheet", "presentationml.presentation")
)

_NAMES: dict[str, tuple[str, str]] = {
    "application/gzip": ("application/x-compressed-tar application/x-gzip application/x-tgz", ".gz"),
    JAR: ("application/x-java-archive", ".jar"),
    "application/json": ("application/x-json text/json", ""),
    OPAQUE: ("binary/octet-stream", _UNKNOWN),
    PDF: ("application/x-pdf", ""),
    RTF: ("application/x-rtf text/rtf", ".rtf"),
    "application/sql": ("application/x-sql", ".sql"),
    EXE: ("application/x-dosexec application/x-msdos-program application/x-msdownload", ".exe .dll"),
    "application/vnd.rar": ("application/x-rar application/x-rar-compressed", ".rar"),
    "application/vnd.sqlite3": ("application/x-sqlite3", ".sqlite"),
    "application/x-bzip2": ("application/bzip2 application/x-bzip", ".bz2"),
    "application/x-executable": ("application/x-elf", ""),
    "application/x-php": ("application/x-httpd-php text/x-php", ".php"),
    "application/x-sh": ("text/x-shellscript", ""),
    "application/xml": ("text/xml", ".xml"),
    "application/yaml": ("application/x-yaml text/x-yaml text/yaml", ".yaml .yml"),
    ZIP: ("application/x-zip application/x-zip-compressed", ""),
    "application/zstd": ("application/x-zstd", ".zst"),
    "audio/aac": ("audio/x-aac", ".aac"),
    "audio/aiff": ("audio/x-aiff", ".aiff"),
    "audio/flac": ("audio/x-flac", ".flac"),
    "audio/midi": ("audio/mid audio/x-midi", ""),
    "audio/mp4": ("audio/m4a audio/x-m4a", ".m4a"),
    "audio/mpeg": ("audio/mp3 audio/x-mp3", ".mp3"),
    "audio/ogg": ("audio/opus", ".ogg .oga .opus"),
    "audio/wav": ("audio/vnd.wave audio/wave audio/x-wav", ""),
    "font/otf": ("application/vnd.ms-opentype application/x-font-otf", ".otf"),
    "font/ttf": ("application/x-font-ttf font/sfnt", ".ttf"),
    "font/woff": ("application/font-woff application/x-font-woff", ".woff"),
    "font/woff2": ("application/font-woff2", ".woff2"),
    "image/bmp": ("image/x-bmp image/x-ms-bmp", ""),
    "image/heic": ("image/heif", ".heic .heif"),
    "image/jp2": ("image/jpx image/jpeg2000", ".jp2"),
    "image/jpeg": ("image/jpg image/pjpeg", ".jpg"),
    "image/png": ("image/apng image/x-png", ".png .apng"),
    SVG: ("image/svg", ""),
    "image/tiff": ("image/tif", ".tiff"),
    "image/vnd.adobe.photoshop": ("image/x-photoshop", ".psd"),
    "image/vnd.microsoft.icon": ("image/ico image/x-icon", ""),
    "text/csv": ("application/csv text/x-csv", ""),
    "text/javascript": ("application/ecmascript application/javascript application/x-javascript", ".js"),
    "text/markdown": ("text/x-markdown", ".md"),
    "video/3gpp": ("video/3gpp2", ""),
    "video/mp4": ("video/x-m4v", ".mp4 .m4v"),
    "video/x-matroska": ("video/matroska", ".mkv"),
    "video/x-msvideo": ("video/avi video/msvideo video/vnd.avi", ""),
}
"""The name that is kept of a type, its other names, and extensions that the standard library lacks in some of its versions; the
first one is that which `fit_filename` appends."""

_EXTENSIONS = (
    f".7z application/x-7z-compressed .apk {APK} .bat application/x-bat .docm "
    f"application/vnd.ms-word.document.macroenabled.12 .docx {DOCX} .epub application/epub+zip .jsonl application/jsonl .mov "
    "video/quicktime .msg application/vnd.ms-outlook .ndjson application/x-ndjson .odp "
    "application/vnd.oasis.opendocument.presentation .ods application/vnd.oasis.opendocument.spreadsheet .odt "
    "application/vnd.oasis.opendocument.text .ogv video/ogg .pl application/x-perl .pptm "
    f"application/vnd.ms-powerpoint.presentation.macroenabled.12 .pptx {PPTX} .toml application/toml .xlsm "
    f"application/vnd.ms-excel.sheet.macroenabled.12 .xlsx {XLSX} .xz application/x-xz"
).split()
"""Extensions, each before its type, of types that have no other name."""

_ALIASES = {other: kind for kind, (others, _) in _NAMES.items() for other in others.split()}
_TYPES = {
    **{one: kind for kind, (_, extensions) in _NAMES.items() for one in extensions.split()},
    **dict(zip(_EXTENSIONS[::2], _EXTENSIONS[1::2], strict=True)),
}

DECLARABLE = {
    "audio/mp4": {"video/mp4"},
    "audio/ogg": {"video/ogg"},
    "video/3gpp": {"audio/3gpp", "video/mp4"},
    "video/mp4": {"audio/mp4", "video/3gpp", "audio/3gpp"},
    "video/ogg": {"audio/ogg"},
    "video/webm": {"audio/webm"},
    "video/x-matroska": {"audio/x-matroska"},
}
"""What a client may declare for a container that a glance does not tell sound from film in."""

_TEXT_NAMES = (
    "ecmascript graphql json json5 jsonl jwt mbox n-quads n-triples pem-certificate-chain pgp-keys pgp-signature postscript "
    "sparql-query sql toml trig typescript vnd.apple.mpegurl x-bat x-bibtex x-csh x-httpd-php-source x-jsonlines x-latex "
    "x-ndjson x-pem-file x-perl x-php x-python x-ruby x-sh x-subrip x-tcl x-tex x-texinfo xml xml-dtd yaml"
)
_TEXT_TYPES = frozenset(f"application/{name}" for name in _TEXT_NAMES.split())
_TEXT_FAMILIES = ("text/", "message/", "multipart/")
_TEXT_SUFFIXES = ("+json", "+xml", "+yaml", "+json-seq")

_RISKY_NAMES = (
    "ade adp apk app appimage application appref-ms ashx asp aspx bash bat cgi chm cjs class cmd com command cpl csh css "
    "deb desktop diagcab dll dmg docm dotm dylib elf exe gadget hlp hta htaccess htc htm html inf ins iqy iso jar jnlp js "
    "jse jsp jspx ksh library-ms lnk mht mhtml mjs msc msi msp mst phar php php3 php4 php5 php7 php8 phps pht phtml pif pkg "
    "pl potm ppam ppsm pptm ps1 psm1 py pyc pyw rb reg rpm run scf scr search-ms settingcontent-ms sh shs shtml so svg svgz "
    "swf sys url vb vbe vbs vhd vhdx wasm website ws wsc wsf wsh xaml xbap xht xhtml xlam xll xlsm xltm xml xsl xslt zsh"
)
_RISKY = frozenset(f".{name}" for name in _RISKY_NAMES.split())
"""Extensions of what a browser, a server or a desktop runs."""


def fit_filename(filename: str | None, content_type: str) -> str | None:
    """Return a file name whose extension does not belong to another type than the content's.

    `evil.html` that is kept as `image/png` becomes `evil.html.png`. An extension of no known type is left, unless it is that of
    something that runs: those stay last only where the content is of their type.
    """
    name = clean_filename(filename)
    if name is None:
        return None
    kind = canonical(content_type)
    suffix = extension(name)
    theirs = types_by_extension().get(suffix)
    is_risky = suffix in _RISKY
    if theirs == kind:
        fits = not is_risky or kind not in (OPAQUE, PLAIN)
    elif is_risky:
        fits = False
    elif theirs is None or theirs == OPAQUE or (is_text_type(kind) and is_text_type(theirs)):
        fits = True
    else:
        fits = theirs in DECLARABLE.get(kind, ()) or kind in DECLARABLE.get(theirs, ())
    return name if fits else clean_filename(name + extension_of(kind))


def fit_public(filename: str | None, content_type: str | None) -> str | None:
    """Return a name for the location of a public object, with an extension of its type that no browser or server runs.

    What serves such objects may know nothing but the extension: a local disk, nginx on a folder, and SeaweedFS, which takes
    `application/octet-stream` for unknown. `page.html` becomes `page.html.bin`, and a picture without a name `file.png`.
    """
    suffix = extension(filename)
    kind = types_by_extension().get(suffix)
    if suffix in _RISKY or (kind is not None and is_active(kind)):
        return f"{filename}{_UNKNOWN}"
    if kind is None and content_type is not None and not is_active(declared := canonical(content_type)):
        own = extension_of(declared)
        return filename if own in _RISKY or own == _UNKNOWN else f"{filename or 'file'}{own}"
    return filename


@lru_cache(maxsize=512)
def canonical(content_type: str) -> str:
    """Return the canonical name of a media type, lower case and without parameters."""
    essence = content_type.partition(";")[0].strip().lower()
    return _ALIASES.get(essence, essence)


def is_text_type(kind: str) -> bool:
    """Return whether a canonical media type is one of text."""
    return kind.startswith(_TEXT_FAMILIES) or kind.endswith(_TEXT_SUFFIXES) or kind in _TEXT_TYPES


def extension(filename: str | None) -> str:
    """Return the last extension, lower case, as Windows sees it: without the dots and spaces that end a name."""
    _, dot, last = (filename or "").rstrip(". ").rpartition(".")
    return dot + last.lower()


def extension_of(kind: str) -> str:
    """Return the extension for a canonical media type, `.txt` for text and `.bin` for what has none."""
    fallback = ".txt" if is_text_type(kind) and not is_active(kind) else _UNKNOWN
    known = chain(_TYPES.items(), types_by_extension().items())
    return next((one for one, other in known if other == kind), fallback)


@lru_cache(maxsize=1)
def types_by_extension() -> dict[str, str]:
    """Return the canonical media type of each extension, the same on every system."""
    tables = mimetypes.MimeTypes().types_map
    return {one: canonical(kind) for table in tables for one, kind in table.items()} | _TYPES


types_by_extension()  # it reads files, and the judgement is made in the event loop
