"""Hostile files, each made in a few lines: a new reader of files is tried on them.

`PICTURES`, `VIDEOS`, `SHARDS`, `JSON`, `WEIGHTS`: {name: bytes}. `mutate` damages honest bytes, and
`mutate_json` honest configs. None of them may cost more than a sample, or one ValueError.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib

import av
import numpy as np
from PIL import Image


def png(side=64, *chunks):
    """A PNG with (kind, data) behind its header."""
    image = io.BytesIO()
    Image.new("RGB", (side, side)).save(image, "PNG")
    whole, parts = image.getvalue(), b""
    for kind, data in chunks:
        check = struct.pack(">I", zlib.crc32(kind + data))
        parts += struct.pack(">I", len(data)) + kind + data + check
    return whole[:33] + parts + whole[33:]


def jpeg_of_scans(scans, side=64):
    """A progressive JPEG whose last scan comes again and again."""
    image = io.BytesIO()
    Image.new("L", (side, side)).save(image, "JPEG", progressive=True)
    whole = image.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


def video(sizes, suffix="mpegts", frames=2, **options):
    """Parts of a video behind each other, (height, width) of each; most of a frame is black."""
    parts = []
    for height, width in sizes:
        file = io.BytesIO()
        with av.open(file, "w", suffix) as container:
            stream = container.add_stream("mpeg4", rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), "rgb24")
            for k in range(frames):
                picture.pts = k
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        parts.append(file.getvalue())
    return b"".join(parts)


def tar(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def bomb(compression=zipfile.ZIP_DEFLATED):
    """A PyTorch file of empty lists, in a few kilobytes where it is compressed."""
    file, lists = io.BytesIO(), b"\x80\x02(" + b"]" * 3_000_000 + b"l."
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", lists)
        archive.writestr("archive/version", "3")
    return file.getvalue()


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


EXIF = b"II\x2b\0\x08\0\0\0"  # BigTIFF's, cut
PICTURES = {
    "EXIF that lies": png(64, (b"eXIf", EXIF)),
    "an endless comment": png(64, (b"tEXt", b"comment\0" + b"[" * 200_000)),
    "a comment that is a list": png(64, (b"tEXt", b"comment\0[1, 2]")),
    "a comment with half a character": png(64, (b"iTXt", b'comment\0\0\0\0\0{"a": "\xed"}')),
    "a header alone": png()[:33],
    "a negative size": png()[:16] + b"\xff" * 8 + png()[24:],
    "too many scans": jpeg_of_scans(2000),
    "no picture": b"<html></html>",
    "nothing": b"",
}
VIDEOS = {
    "a playlist": b"ffconcat version 1.0\nfile secret.mp4\n",
    "a stream": b"#EXTM3U\n#EXTINF:4,\nhttp://127.0.0.1:9/secret.mp4\n#EXT-X-ENDLIST\n",
    "a header alone": video([(64, 64)])[:376],
    "an mp4 that ends early": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2\0\0\1\0moov",
    "nothing": b"",
}
SHARDS = {
    "a member beyond the end": tar(("a.mp4", bytes(600)))[:700],
    "a caption that is deep": tar(("a.mp4", b"x"), ("a.json", b"[" * 60_000)),
    "nothing": b"",
}
DEEP, HUGE = '{"a": ' + "[" * 100_000, '{"a": ' + "9" * 5000 + "}"
JSON = {
    "nothing": b"",
    "a list": b"[1]",
    "half a character": b'{"a": "\xed"}',
    "a key twice": b'{"a": 1, "a": 2}',
    "an endless nesting": DEEP.encode(),
    "a number of 5,000 digits": HUGE.encode(),
    "9 MB": b'{"a": [' + b"[]," * 3_000_000 + b"[]]}",
}
WEIGHTS = {
    "a deflated bomb.bin": bomb(),
    "a stored bomb.bin": bomb(zipfile.ZIP_STORED),
    "an older bomb.bin": b"\x80\x02(" + b"]" * 3_000_000 + b"l.",
    "code.bin": pickle.dumps(os.getcwd, 2),
    "a list as metadata.safetensors": safetensors({"__metadata__": [1]}),
    "a header of 9 MB.safetensors": safetensors(b" " * 9_000_000 + b"{}"),
    "an index of itself.json": b'{"weight_map": {"a": "an index of itself.json"}}',
    "an index of a number.json": b'{"weight_map": {"a": 5}}',
}
# What the values of a config may become, whatever they were.
VALUES = [None, True, -1, 0, 0.5, 2**70, 10**9, float("nan"), "16", "", [], [0], [[]], {}]
VALUES += [[10**6] * 9]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut, doubled or put elsewhere, in one to eight places."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        if not data:
            return b""
        begin, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
        kind, other = rng.integers(6), int(rng.integers(len(data)))
        if kind < 3:
            data[begin] = [0, 255, int(rng.integers(256))][kind]
        elif kind == 3:
            del data[begin : begin + size]
        elif kind == 4:
            data[begin:begin] = data[other : other + size]
        else:
            data[begin : begin + size] = rng.bytes(size)
    return bytes(data[: rng.integers(len(data) + 1)] if rng.random() < 0.1 else data)


def mutate_json(text: str, rng: np.random.Generator) -> str:
    """One value of a JSON object taken away, or made one of VALUES."""
    content = json.loads(text)
    key = sorted(content)[rng.integers(len(content))]
    if rng.random() < 0.2:
        del content[key]
    else:
        content[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(content)
