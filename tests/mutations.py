"""Files damaged at random, but so that much of their structure stays: a parser gets deep into them before it fails."""

import ast
import io
import json
import random
import struct
import tarfile
import zipfile
import zlib

NASTY = [None, True, -1, 0, 1, 3, 2**31, 10**9, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "\0", "\n"]
NASTY += [
    "../../x",
    "/dev/zero",
    "a" * 100_000,
    "\u2028",
    "\ud800",
    "0",
    "-1",
    "nan",
    "1" * 5000,
    [],
    {},
    [[[]]],
    [None],
]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64", "F4", "?"]
NUMPY_DTYPES = [
    "<f8",
    "<f4",
    "<f2",
    ">f4",
    "|O",
    "<U1000000000",
    "<c16",
    "|b1",
    "<i8",
    "|V9",
    "<M8[s]",
    "|S5",
    "x",
    "<f16",
]
WORDS = [
    b"\0",
    b"\n",
    b"\r",
    b"\xff",
    b"\xfe\xff",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 50_000,
    b"{",
    b"- ",
    b": ",
    b"&a *a",
]
WORDS += [
    b"!!python/object/apply:os.system",
    b"1e999",
    b"9" * 5000,
    b"'",
    b'"',
    b"%",
    b"\\",
    b"../",
    b"~",
    b"{0..999999999}",
]


def mutated(name: str, content: bytes, rng: random.Random) -> bytes:
    """Another content for the file `name`."""
    structured = next((change for ending, change in STRUCTURED.items() if name.lower().endswith(ending)), None)
    if structured and rng.random() < 0.75:
        return structured(content, rng)
    return scrambled(content, rng)


def scrambled(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        match rng.randrange(7):
            case 0 if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
            case 1:
                content[i:j] = b""
            case 2:
                content[i:i] = rng.choice(WORDS)
            case 3:
                content[i:j] = bytes(j - i)
            case 4:
                content[i:i] = content[i : min(j, i + 4096)]
            case 5:
                del content[i:]
            case 6:
                content[i : i + 8] = struct.pack("<q", rng.choice((-1, 0, 2**31, 2**62, 10**9)))
    return bytes(content)


# ---- Text ------------------------------------------------------------------------------------------------------------
def changed(tree: object, rng: random.Random) -> object:
    """A JSON value in which something is another."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.9:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        tree, key = tree.copy(), rng.choice(keys)
        match rng.randrange(8):
            case 0:
                del tree[key]
            case 1 if isinstance(tree, dict):
                tree[rng.choice(("../x", "", "x" * 300, "\n", "shards", "depth"))] = tree.pop(key)
            case 2 if isinstance(tree, list):
                tree.append(tree[key])
            case _:
                tree[key] = changed(tree[key], rng)
        return tree
    if isinstance(tree, int) and rng.random() < 0.3:
        return tree + rng.choice((-1, 1, 10**6, tree))
    return rng.choice(NASTY)


def as_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(changed(json.loads(content), rng)).encode()


def as_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    lines[i] = as_json(lines[i], rng) if lines[i].startswith(b"{") else rng.choice(WORDS)
    return b"\n".join(lines)


def as_text(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return content.decode().encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7")))
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    start, colon, _ = lines[i].partition(b": ")
    value = json.dumps(rng.choice(NASTY)).encode() if rng.random() < 0.7 else rng.choice(WORDS)
    lines[i] = start + colon + value
    return b"\n".join(lines)


# ---- Tensors and arrays ----------------------------------------------------------------------------------------------
def as_safetensors(content: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = rng.choice(list(header))
    entry = header[name] = dict(header[name])
    match rng.randrange(6):
        case 0 if "dtype" in entry:
            entry["dtype"] = rng.choice(DTYPES)
        case 1 if "shape" in entry:  # the same numbers in another shape
            entry["shape"] = rng.choice((entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1]))
        case 2 if name != "__metadata__":
            header[rng.choice(("x", name + "1", "module." + name, "_orig_mod." + name))] = header.pop(name)
        case 3 if "dtype" in entry:  # other numbers: NaN, infinite, tiny
            begin, end = entry["data_offsets"]
            data = data[:begin] + rng.choice((b"\xff", b"\x7f\x80", b"\0", b"\x01")) * (end - begin) + data[end:]
            data = data[: len(content) - 8 - size]
        case _:
            header = changed(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def as_npy(content: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[8:10], "little")
    header, data = ast.literal_eval(content[10 : 10 + size].decode()), content[10 + size :]
    match rng.randrange(4):
        case 0:
            header["descr"] = rng.choice(NUMPY_DTYPES)
        case 1:
            header["shape"] = rng.choice(
                ((10**9,), (0,), (), (-1,), (2**40, 2**40), (1, *header["shape"]), header["shape"][1:])
            )
        case 2:
            header["fortran_order"] = rng.choice((True, None, 3))
        case 3:
            data = scrambled(data, rng)
    text = repr(header).encode()
    return content[:8] + len(text).to_bytes(2, "little") + text + data


def as_zip(content: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name, out = rng.choice(list(members)), io.BytesIO()
    match rng.randrange(5):
        case 0:
            members[name + "x"] = members.pop(name)
        case 1:
            del members[name]
        case 2:
            members[name] = bytes(10_000_000)
        case _:
            members[name] = as_npy(members[name], rng) if name.endswith(".npy") else scrambled(members[name], rng)
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    if sum(map(len, members.values())) > 10**6:
        compression = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


# ---- Archives and images ---------------------------------------------------------------------------------------------
def as_tar(content: bytes, rng: random.Random) -> bytes:
    """With a field of a header changed, and its checksum right again; or with another content of a member."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
    member, content = rng.choice(members), bytearray(content)
    header = memoryview(content)[member.offset : member.offset + 512]
    sizes = (
        b"77777777777\0",
        b"00000000000\0",
        b"\x80" + bytes(3) + b"\0\0\1\0\0\0\0\0",
        b"-0000000001\0",
        b"00000000777\0",
    )
    match rng.randrange(6):
        case 0:
            new = rng.choice(
                (b"../../x.png", b"/etc/x.png", b"a/b.png", b".png", b"\xff.png", b"a\nb.png", b"a.b.c.png", b"")
            )
            header[:100] = new.ljust(100, b"\0")
        case 1:
            header[124:136] = rng.choice(sizes)
        case 2:
            header[156:157] = rng.choice((b"1", b"2", b"3", b"5", b"6", b"x", b"g", b"L", b"K", b"S", b"\xff"))
        case 3:
            header[156:157] = rng.choice((b"1", b"2"))
            header[157:257] = rng.choice((member.name.encode(), members[0].name.encode(), b"/etc/passwd")).ljust(
                100, b"\0"
            )
        case _:
            start, end = member.offset_data, member.offset_data + member.size
            data = mutated(member.name, bytes(content[start:end]), rng)[: member.size].ljust(member.size, b"\0")
            content = content[:start] + data + content[end:]
            return bytes(content)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(content)


def as_png(content: bytes, rng: random.Random) -> bytes:
    chunks, place = [], 8
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    i = rng.randrange(len(chunks))
    match rng.randrange(5):
        case 0:
            width, height = (rng.choice((0, 1, 2, 16, 30_000, 2**31 - 1)) for _ in range(2))
            depth, colour = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 1))
            chunks[0] = b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 1, 2)))
        case 1:
            del chunks[i]
        case 2:
            kind = rng.choice((b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"gAMA", b"XXXX"))
            chunks.insert(rng.randrange(len(chunks)), (kind, rng.randbytes(rng.choice((0, 1, 3, 6, 40)))))
        case 3:
            chunks[i] = chunks[i][0], scrambled(chunks[i][1], rng)
        case 4:
            chunks[i] = b"IDAT", zlib.compress(bytes(rng.choice((0, 10, 10**6))))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return content[:8] + b"".join(parts)


STRUCTURED = {
    ".json": as_json,
    ".jsonl": as_lines,
    ".yaml": as_text,
    ".txt": as_text,
    ".safetensors": as_safetensors,
    ".npy": as_npy,
    ".npz": as_zip,
    ".idx": as_zip,
    ".pth": as_zip,
    ".tar": as_tar,
    ".png": as_png,
}
