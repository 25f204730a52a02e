"""Small pictures with metadata of every kind in them: words that must go, and words that must stay."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

from PIL import Image, ImageCms

Entry: TypeAlias = tuple[int, int, Any]

PLACE = b"Geheimdorf"
NOTE = b"SecretMakerNote"
POSITION = [(52, 1), (31, 1), (12345, 1000)]
DECIMAL = b"52.520096"
SECRETS = [PLACE, NOTE, DECIMAL, *(struct.pack(order + "II", *POSITION[2]) for order in "<>")]
"""What must not be in a picture without its location, in any encoding."""

CAMERA, RIGHTS, REMARK = b"KeptCamera", b"KeptRights", b"KeptRemark"

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP_NAME = b"http://ns.adobe.com/xap/1.0/\0"


@dataclass(frozen=True)
class Picture:
    """A file, and what of it must stay without its location."""

    content_type: str
    data: bytes
    orientation: int = 1
    has_profile: bool = False
    kept: Sequence[bytes] = field(default=())


def decode(data: bytes) -> list[tuple[str, tuple[int, int], bytes]]:
    """Return the pixels of each frame."""
    with _opened(data) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append((image.mode, image.size, image.tobytes()))
        return frames


def properties(data: bytes) -> tuple[int, bytes | None, Any]:
    """Return the orientation, the colour profile and how long each frame is shown."""
    with _opened(data) as image:
        image.load()
        return image.getexif().get(0x0112, 1), image.info.get("icc_profile"), image.info.get("duration")


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
        yield image


# EXIF


def tiff(order: str, first: list[Entry], second: list[Entry] | None = None) -> bytes:
    """Write a TIFF structure; the value of an entry may be another IFD, a list of entries."""
    out = bytearray((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8))

    def write(entries: list[Entry], following: list[Entry] | None = None) -> int:
        start = len(out)
        out.extend(struct.pack(order + "H", len(entries)) + bytes(12 * len(entries) + 4))
        for number, (tag, kind, value) in enumerate(entries):
            at = start + 2 + 12 * number
            if isinstance(value, list):
                raw, kind, count = struct.pack(order + "I", write(value)), 4, 1
            else:
                size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 10: 8}[kind]
                raw, count = value, len(value) // size
            if len(raw) > 4:
                place = len(out)
                out.extend(raw + bytes(len(raw) % 2))
                raw = struct.pack(order + "I", place)
            struct.pack_into(order + "HHI4s", out, at, tag, kind, count, raw.ljust(4, b"\0"))
        if following is not None:
            struct.pack_into(order + "I", out, start + 2 + 12 * len(entries), write(following))
        return start

    write(first, second)
    return bytes(out)


def exif(order: str = "<", orientation: int = 6, *, thumbnail: bytes = b"") -> bytes:
    """Write what a phone writes: camera, orientation, copyright, a maker note, GPS, and a thumbnail."""
    rational = b"".join(struct.pack(order + "II", *part) for part in POSITION)
    gps = [
        (0, 1, b"\2\3\0\0"),
        (1, 2, b"N\0"),
        (2, 5, rational),
        (3, 2, b"E\0"),
        (4, 5, rational),
        (27, 7, b"ASCII\0\0\0" + PLACE),
        (29, 2, b"2026:11:28\0"),
    ]
    details: list[Entry] = [
        (0x829A, 5, struct.pack(order + "II", 1, 250)),
        (0x9000, 7, b"0232"),
        (0x927C, 7, NOTE),
        (0x9286, 7, b"ASCII\0\0\0" + REMARK),
        (0xA005, 4, [(1, 2, b"R98\0")]),
    ]
    first: list[Entry] = [
        (0x010F, 2, CAMERA + b"\0"),
        (0x0112, 3, struct.pack(order + "H", orientation)),
        (0x011A, 5, struct.pack(order + "II", 72, 1)),
        (0x8298, 2, RIGHTS + b"\0"),
        (0x8769, 4, details),
        (0x8825, 4, gps),
    ]
    if not thumbnail:
        return tiff(order, first)
    second = [
        (0x0103, 3, struct.pack(order + "H", 6)),
        (0x0201, 4, bytes(4)),
        (0x0202, 4, struct.pack(order + "I", len(thumbnail))),
    ]
    written = bytearray(tiff(order, first, second) + thumbnail)
    entry = written.index(struct.pack(order + "HHI", 0x0201, 4, 1)) + 8
    struct.pack_into(order + "I", written, entry, len(written) - len(thumbnail))
    return bytes(written)


def xmp(*properties: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF'
        ' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:exif="http://ns.adobe.com/exif/1.0/"'
        ' xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"'
        f" {' '.join(properties)}/></rdf:RDF></x:xmpmeta><?xpacket end='w'?>"
    ).encode()


XMP_KEPT = xmp(
    f'dc:source="{REMARK.decode()}"',
    'dc:relation="base64 of aGpSAb+gpS/GPS1"',
    'photoshop:Credit="opacity and velocity of states"',
)
XMP_PLACES = [
    xmp(f'exif:GPSLatitude="{DECIMAL.decode()}N"'),
    xmp(f'photoshop:City="{PLACE.decode()}"'),
    xmp(f'photoshop:Country="{PLACE.decode()}"'),
    xmp(f'xmlns:Iptc4xmpCore="http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/" Iptc4xmpCore:Location="{PLACE.decode()}"'),
    xmp(f'xmlns:geo="http://www.w3.org/2003/01/geo/wgs84_pos#" geo:lat="{DECIMAL.decode()}"'),
    xmp(f'dc:source="geo:{DECIMAL.decode()},13.4"'),
    xmp(f'xmlns:d="http://www.dji.com/drone-dji/1.0/" d:Flight-Altitude="{DECIMAL.decode()}"'),
    xmp(f'dc:source="{PLACE.decode()}, GPS {DECIMAL.decode()}"'),
]
XMP_PLACES.append(XMP_PLACES[0].decode().encode("utf-16"))


# JPEG


def segment(code: int, content: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content


def resource(kind: int, data: bytes) -> bytes:
    return b"8BIM" + struct.pack(">HHI", kind, 0, len(data)) + data + bytes(len(data) % 2)


def record(number: int, text: bytes) -> bytes:
    return struct.pack(">BBBH", 0x1C, 2, number, len(text)) + text


RIGHTS_RESOURCE = resource(0x040B, RIGHTS)
PHOTOSHOP = b"Photoshop 3.0\0"
IPTC_KEPT = resource(0x0404, record(116, RIGHTS))


def iptc_place(number: int) -> bytes:
    return resource(0x0404, record(120, b"caption") + record(number, PLACE))


def photo() -> Image.Image:
    gradient = Image.linear_gradient("L").resize((40, 24))
    return Image.merge("RGB", (gradient, gradient.rotate(180), Image.effect_noise((40, 24), 60)))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """Put segments after JFIF's."""
    at = 4 + struct.unpack_from(">H", jpeg, 4)[0] if jpeg[2:4] == b"\xff\xe0" else 2
    return jpeg[:at] + b"".join(segments) + jpeg[at:]


def jpeg_scans(jpeg: bytes) -> Iterator[int]:
    """Yield where the segments from the second scan's tables on begin."""
    at = 2
    seen = 0
    while jpeg[at + 1] != 0xD9:
        if seen:
            yield at
        code, length = jpeg[at + 1], struct.unpack_from(">H", jpeg, at + 2)[0]
        at += 2 + length
        if code == 0xDA:
            seen += 1
            while jpeg[at] != 0xFF or jpeg[at + 1] in (0, *range(0xD0, 0xD8)):
                at += 1


@cache
def jpegs() -> dict[str, Picture]:
    found = {}

    def add(name: str, data: bytes, *segments: bytes, tail: bytes = b"", **expected: Any) -> None:
        found[f"jpeg {name}"] = Picture("image/jpeg", with_segments(data, *segments) + tail, **expected)

    image = photo()
    plain = saved(image, "JPEG", quality=80)
    progressive = saved(image, "JPEG", progressive=True, quality=90, icc_profile=ICC)
    restarts = saved(image, "JPEG", restart_marker_blocks=2)
    thumbnail = with_segments(saved(image.resize((16, 8)), "JPEG"), segment(0xFE, PLACE), segment(0xE1, b"Exif\0\0" + exif(">")))
    add("plain", plain)
    add("grey", saved(image.convert("L"), "JPEG"))
    add("CMYK", saved(image.convert("CMYK"), "JPEG", icc_profile=ICC), has_profile=True)
    for order in "<>":
        for orientation in range(1, 9):
            metadata = segment(0xE1, b"Exif\0\0" + exif(order, orientation, thumbnail=thumbnail if orientation == 3 else b""))
            kept = (CAMERA, RIGHTS, REMARK, b"R98")
            add(f"EXIF {order} {orientation}", restarts, metadata, orientation=orientation, kept=kept)
    add("two EXIFs", plain, *[segment(0xE1, b"Exif\0\0" + exif(order, 8)) for order in "<>"], orientation=8, kept=[CAMERA])
    add("two EXIFs, the first upright", plain, *[segment(0xE1, b"Exif\0\0" + exif(">", each)) for each in (1, 8)], kept=[CAMERA])
    add("progressive", progressive, segment(0xE1, b"Exif\0\0" + exif()), has_profile=True, orientation=6, kept=[CAMERA])
    between = list(jpeg_scans(progressive))
    at = between[len(between) // 2]
    hidden = segment(0xE1, b"Exif\0\0" + exif()) + segment(0xFE, b"GPS " + PLACE) + segment(0xEF, PLACE)
    add("between scans", progressive[:at] + hidden + b"\xff\xff" + progressive[at:], has_profile=True)
    add("fill bytes", plain.replace(b"\xff\xdb", b"\xff\xff\xff\xff\xdb"), b"\xff\xff" + segment(0xFE, b"GPS " + PLACE))
    add("comment", plain, segment(0xFE, REMARK), segment(0xFE, b"latitude " + DECIMAL), kept=[REMARK])
    for number, packet in enumerate(XMP_PLACES):
        add(f"XMP {number}", plain, segment(0xE1, XMP_NAME + packet), segment(0xFE, REMARK), kept=[REMARK])
    add("XMP kept", plain, segment(0xE1, XMP_NAME + XMP_KEPT), kept=[XMP_KEPT])
    extended = b"http://ns.adobe.com/xmp/extension/\0" + b"A" * 32 + struct.pack(">II", 40, 0) + PLACE
    add("extended XMP", plain, segment(0xE1, XMP_NAME + XMP_KEPT), segment(0xE1, extended), kept=[REMARK])
    for place in (0x1A, 0x1B, 90, 92, 95, 100, 101):
        add(f"IPTC {place}", plain, segment(0xED, PHOTOSHOP + RIGHTS_RESOURCE + iptc_place(place)), kept=[RIGHTS])
    add("IPTC kept", plain, segment(0xED, PHOTOSHOP + IPTC_KEPT + RIGHTS_RESOURCE), kept=[IPTC_KEPT + RIGHTS_RESOURCE])
    others = [resource(0x0422, exif()), resource(0x0424, XMP_PLACES[0]), RIGHTS_RESOURCE]
    add("Photoshop", plain, segment(0xED, PHOTOSHOP + b"".join(others)), kept=[RIGHTS])
    add("Photoshop in two", plain, segment(0xED, PHOTOSHOP + others[0][:60]), segment(0xED, PHOTOSHOP + others[0][60:]))
    add("vendors", plain, *[segment(code, b"VENDOR\0" + PLACE) for code in range(0xE0, 0xF0)])
    add("MPF", plain, segment(0xE2, b"MPF\0II*\0" + PLACE), tail=with_segments(plain, segment(0xE1, b"Exif\0\0" + exif())))
    add("motion photo", plain, tail=b"\0\0\0\x18ftypmp42" + PLACE + bytes(1000) + b"SEFT")
    return found


# PNG


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_profile(kind: bytes, data: bytes) -> bytes:
    text = data.hex()
    lines = "\n".join(text[at : at + 72] for at in range(0, len(text), 72)).encode()
    return b"\n%s\n%8d\n%s\n" % (kind, len(data), lines)


def text(keyword: bytes, value: bytes) -> bytes:
    return chunk(b"tEXt", keyword + b"\0" + value)


def compressed(keyword: bytes, value: bytes) -> bytes:
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(value))


def international(keyword: bytes, value: bytes, *, compress: bool = False) -> bytes:
    value = zlib.compress(value) if compress else value
    return chunk(b"iTXt", keyword + b"\0" + bytes([compress, 0]) + b"en\0\0" + value)


@cache
def pngs() -> dict[str, Picture]:
    found = {}

    def add(name: str, data: bytes, *early: bytes, late: bytes = b"", tail: bytes = b"", **expected: Any) -> None:
        found[f"png {name}"] = Picture(
            "image/png", data[:33] + b"".join(early) + data[33:-12] + late + data[-12:] + tail, **expected
        )

    image = photo()
    plain = saved(image, "PNG", icc_profile=ICC)
    animated = saved(image, "PNG", save_all=True, append_images=[image.rotate(90), image.rotate(180)], duration=[70, 80, 90])
    palette = saved(image.quantize(16), "PNG", transparency=3)
    add("plain", plain, has_profile=True)
    add("grey", saved(image.convert("I;16"), "PNG"))
    add("palette", palette, chunk(b"eXIf", exif()), orientation=6, kept=[CAMERA])
    add("animated", animated, chunk(b"eXIf", exif(">", 1)), text(b"Comment", REMARK), kept=[CAMERA, REMARK])
    for orientation in range(1, 9):
        add(f"EXIF {orientation}", plain, chunk(b"eXIf", exif(">", orientation)), has_profile=True, orientation=orientation)
    add("EXIF late", palette, late=chunk(b"eXIf", b"Exif\0\0" + exif()) + chunk(b"eXIf", exif()), orientation=6, kept=[RIGHTS])
    for number, packet in enumerate(XMP_PLACES):
        add(f"XMP {number}", palette, international(b"XML:com.adobe.xmp", packet, compress=number % 2 == 0))
    add("XMP kept", palette, international(b"XML:com.adobe.xmp", XMP_KEPT), kept=[XMP_KEPT])
    add("texts", palette, text(b"exif:GPSLatitude", DECIMAL), text(b"Location", PLACE), text(b"Author", RIGHTS), kept=[RIGHTS])
    add("late texts", palette, late=compressed(b"Comment", b"latitude " + DECIMAL) + international(b"City", PLACE))
    add(
        "broken text",
        palette,
        chunk(b"zTXt", b"Comment\0\0" + PLACE),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a") + PLACE),
    )
    for writer in (text, compressed):
        profile = raw_profile(b"exif", b"Exif\0\0" + exif("<", 5))
        add(f"raw EXIF {writer.__name__}", palette, writer(b"Raw profile type exif", profile), orientation=5)
    turned = compressed(b"Raw profile type exif", raw_profile(b"exif", exif("<", 5)))
    add("raw EXIF before EXIF", palette, turned, chunk(b"eXIf", exif("<", 3)), orientation=3, kept=[CAMERA])
    raw = raw_profile(b"APP1", XMP_NAME + XMP_PLACES[0])
    add("raw APP1", palette, compressed(b"Raw profile type APP1", raw), text(b"Raw profile type xmp", b"\nxmp\n 3\nzz\n"))
    add(
        "raw IPTC",
        palette,
        *[text(b"Raw profile type iptc", raw_profile(b"iptc", data)) for data in (iptc_place(90), record(90, PLACE))],
    )
    add("unknown chunks", palette, chunk(b"vvNd", PLACE), chunk(b"caBX", PLACE))
    add("tail", palette, tail=PLACE + bytes(50))
    return found


# WebP


def webp_chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def riff(*chunks: bytes) -> bytes:
    body = b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return the chunks; fail where their lengths do not fit the file."""
    assert (data[:4], data[8:12]) == (b"RIFF", b"WEBP")
    assert struct.unpack_from("<I", data, 4)[0] == len(data) - 8
    at, found = 12, []
    while at < len(data):
        size = struct.unpack_from("<I", data, at + 4)[0]
        found.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    assert at == len(data)
    return found


@cache
def webps() -> dict[str, Picture]:
    found = {}

    def add(name: str, data: bytes, **expected: Any) -> None:
        found[f"webp {name}"] = Picture("image/webp", data, **expected)

    image = photo()
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    frames = {"save_all": True, "append_images": [clear.rotate(90), clear.rotate(180)], "duration": [70, 80, 90]}
    place = XMP_PLACES[0]
    add("plain", saved(image, "WEBP"))
    add("lossless", saved(clear, "WEBP", lossless=True))
    for order in "<>":
        for orientation in range(1, 9):
            data = saved(image, "WEBP", exif=exif(order, orientation), xmp=place, icc_profile=ICC)
            add(f"EXIF {order} {orientation}", data, orientation=orientation, has_profile=True, kept=[CAMERA, REMARK])
    add("alpha", saved(clear, "WEBP", exif=exif(), xmp=XMP_KEPT), orientation=6, kept=[XMP_KEPT, CAMERA])
    add("animated", saved(clear, "WEBP", **frames, exif=b"Exif\0\0" + exif(), xmp=place), orientation=6, kept=[CAMERA])
    chunks = [webp_chunk(*each) for each in webp_chunks(saved(clear, "WEBP", exif=exif(), xmp=place))]
    more = [webp_chunk(name, PLACE * 5 + b"!") for name in (b"C2PA", b"abcd", b"JUNK", b"EXIF", b"\0\xff\n\r")]
    add("more chunks", riff(*chunks, *more), orientation=6, kept=[CAMERA])
    add("tail", saved(image, "WEBP") + PLACE)
    add("without flags", riff(*[webp_chunk(*each) for each in webp_chunks(saved(image, "WEBP"))], webp_chunk(b"XMP ", place)))
    for number, packet in enumerate(XMP_PLACES):
        add(f"XMP {number}", saved(image, "WEBP", xmp=packet))
    return found


def corpus() -> dict[str, Picture]:
    return jpegs() | pngs() | webps()
