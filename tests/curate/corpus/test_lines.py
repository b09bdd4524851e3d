"""Lines of compressed shards: what is taken, every way in which a file can be cut, and the memory that it costs."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_l0moe.curate.corpus import lines
from megatron_l0moe.curate.corpus.lines import BrokenShardError, read_lines

PACK = {"": bytes, ".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress,
        ".bz2": bz2.compress, ".xz": lzma.compress}  # fmt: skip
CONTENT = [b"one", b"", b"x" * 500, b"three"]
FOUND = [(1, b"one"), (3, b"x" * 500), (4, b"three")]
SKIPPED = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


def read(data: bytes, name: str = "a.jsonl") -> list[tuple[int, bytes | None]]:
    return list(read_lines(io.BytesIO(data), name))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.zst", "a.gz"])
@pytest.mark.parametrize("end", [b"\n", b"", b"\n\n \r\n"], ids=["newline", "no newline", "blanks"])
def test_lines(suffix: str, name: str, end: bytes) -> None:
    """The content counts, not the name, so plain text may be named as compressed and the other way round."""
    assert read(PACK[suffix](b"\n".join(CONTENT) + end), name) == FOUND


@pytest.mark.parametrize("suffix", [s for s in PACK if s])
def test_several_frames_and_lines_across_chunks(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 7)
    monkeypatch.setattr(lines, "SLICE_BYTES", 3)
    whole = b"\n".join(CONTENT)
    assert read(PACK[suffix](whole[:40]) + PACK[suffix](b"") + PACK[suffix](whole[40:])) == FOUND


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    content=st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"-")), max_size=9),
    chunk=st.integers(1, 12),
    suffix=st.sampled_from(sorted(PACK)),
)
def test_chunks_do_not_matter(content: list[bytes], chunk: int, suffix: str) -> None:
    whole = b"#" + b"\n".join(content)  # no byte of a compressed file at the beginning
    expected = [
        (n, line) for n, line in enumerate(whole.split(b"\n"), start=1) if line and not line.isspace()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk)
        assert read(PACK[suffix](whole)) == expected


def long_window(content: bytes) -> bytes:
    """As `zstd --long=28` writes."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


def with_gzip_header(content: bytes) -> bytes:
    """A member with an extra field, a file name and a comment, as bgzip and others write."""
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    body = raw.compress(content) + raw.flush()
    head = b"\x1f\x8b\x08\x1c" + bytes(6) + b"\x06\x00BC\x02\x00\x00\x00" + b"name\x00" + b"comment\x00"
    return head + body + zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(4, "little")


@pytest.mark.parametrize(
    "packed",
    [
        long_window,
        lambda content: SKIPPED + zstandard.compress(content) + SKIPPED,
        lambda content: gzip.compress(content) + bytes(1000),
        with_gzip_header,
    ],
    ids=["long window", "skippable frames", "zero padding", "gzip header"],
)
def test_what_the_tools_take(packed) -> None:
    assert read(packed(b"\n".join(CONTENT))) == FOUND
    assert zstandard.get_frame_parameters(long_window(b"x" * 99)).window_size == 1 << 28


@pytest.mark.parametrize("suffix", PACK)
def test_nothing(suffix: str) -> None:
    assert read(PACK[suffix](b"")) == []
    assert read(b"", f"a{suffix}") == []  # no bytes are no damage: there is nothing that could be missing


@pytest.mark.parametrize("suffix", [s for s in PACK if s])
@pytest.mark.parametrize("cut", [1, 5, 12], ids=lambda cut: f"minus{cut}")
def test_truncated(suffix: str, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 16)
    monkeypatch.setattr(lines, "SLICE_BYTES", 16)
    whole = b"".join(b"line %d %d\n" % (i, i * 7919) for i in range(400))
    found: list[tuple[int, bytes | None]] = []
    with pytest.raises(BrokenShardError, match=r"ends inside a \w+ frame, so it is truncated"):
        found.extend(read_lines(io.BytesIO(PACK[suffix](whole)[:-cut]), f"a{suffix}"))
    assert found == list(enumerate(whole.splitlines()[: len(found)], start=1))


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_damaged_and_other_data(suffix: str) -> None:
    with pytest.raises(BrokenShardError, match=r"is not valid (zst|gz) data \(it begins with 00ff"):
        read(b"\x00\xff\x00\xff", f"a{suffix}")
    good = PACK[suffix](b"some text\n" * 50)
    with pytest.raises(BrokenShardError, match=r"is not valid (zstd|gzip) data"):
        read(good + b"trailing garbage", f"a{suffix}")
    damaged = bytearray(PACK[suffix](b"".join(b"%d\n" % (i * 7919) for i in range(9999))))
    damaged[len(damaged) // 2 :: 7] = bytes(len(damaged[len(damaged) // 2 :: 7]))
    with pytest.raises(BrokenShardError, match=r"is not valid (zstd|gzip) data|ends inside"):
        read(bytes(damaged))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04" + bytes(30), "zip"),
        (b"PAR1" + bytes(30), "Parquet"),
        (b"\x04\x22\x4d\x18" + bytes(30), "lz4"),
        (b"a.jsonl".ljust(257, b"\0") + b"ustar" + bytes(250), "tar"),
    ],
)
def test_what_is_not_read_is_named(content: bytes, kind: str) -> None:
    for packed in (content, gzip.compress(content), zstandard.compress(content)):
        with pytest.raises(BrokenShardError, match=f"holds {kind} data, which is not read"):
            read(packed)


def test_a_line_that_is_too_long_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 14)
    file = io.BytesIO(b"a\n" + b"x" * (1 << 22) + b"\nb\n" + b"y" * (1 << 14) + b"\n" + b"z" * (1 << 15))
    tracemalloc.start()
    found = list(read_lines(file, "a.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1, b"a"), (2, None), (3, b"b"), (4, b"y" * (1 << 14)), (5, None)]
    assert peak < 1 << 18


READ = """
import resource, sys
from pathlib import Path
from megatron_l0moe.curate.corpus import lines

def megabytes():  # Linux counts the parent's memory in ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

lines.MAX_LINE_BYTES = 32 << 20
before = megabytes()
with open(sys.argv[1], "rb") as file:
    found = list(lines.read_lines(file, sys.argv[1]))
print(found, megabytes() - before)
"""


def bomb(kind: str, byte: bytes) -> bytes:
    """3 GiB in one frame of 98 kB of zstd, or 256 MiB in 256 kB of gzip."""
    if kind == "gz":
        return gzip.compress(byte * (1 << 28), 6)
    frame = zstandard.ZstdCompressor(level=1).compressobj()
    piece = byte * (1 << 26)
    return b"".join([frame.compress(piece) for _ in range(48)]) + frame.flush()


@pytest.mark.parametrize(("byte", "found"), [(b"\n", []), (b"x", [(1, None)])], ids=["newlines", "one line"])
@pytest.mark.parametrize("kind", ["zst", "gz"])
def test_memory_of_a_bomb(tmp_path: Path, kind: str, byte: bytes, found: list[tuple[int, None]]) -> None:
    """It takes 64 MB, and the longest line that is allowed (here 32 MiB)."""
    file = tmp_path / f"a.jsonl.{kind}"
    file.write_bytes(bomb(kind, byte))
    assert file.stat().st_size < (100_000 if kind == "zst" else 300_000)
    command = [sys.executable, "-c", READ, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result, grown = done.stdout.rsplit(maxsplit=1)
    assert result == repr(found)
    assert float(grown) < 64 + (32 if found else 0)
