"""Lines of compressed shards: several frames, lines across chunks, and every way in which a file can be cut."""

import gzip
import io
import tracemalloc

import pytest
import zstandard

from megatron_l0moe.data import lines
from megatron_l0moe.data.lines import BrokenShardError, read_lines

PACK = {"": bytes, ".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress}
CONTENT = [b"one", b"", b"x" * 500, b"three"]


def read(data: bytes, name: str) -> list[bytes | None]:
    return list(read_lines(io.BytesIO(data), name))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", [b"\n", b""], ids=["newline", "no newline"])
def test_lines(suffix: str, end: bytes) -> None:
    assert read(PACK[suffix](b"\n".join(CONTENT) + end), f"a{suffix}") == CONTENT


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_several_frames_and_lines_across_chunks(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 7)
    whole = b"\n".join(CONTENT)
    assert read(PACK[suffix](whole[:40]) + PACK[suffix](whole[40:]), f"a{suffix}") == CONTENT


@pytest.mark.parametrize("suffix", PACK)
def test_nothing(suffix: str) -> None:
    assert read(PACK[suffix](b""), f"a{suffix}") == []
    assert (
        read(b"", f"a{suffix}") == []
    )  # a file of no bytes is no damage: there is nothing that could be missing


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
@pytest.mark.parametrize("cut", [1, 5, 12], ids=lambda cut: f"minus{cut}")
def test_truncated(suffix: str, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 16)
    whole = b"".join(b"line %d %d\n" % (i, i * 7919) for i in range(400))
    found: list[bytes | None] = []
    with pytest.raises(BrokenShardError, match=r"ends inside a (zstd|gzip) frame, so it is truncated"):
        found.extend(read_lines(io.BytesIO(PACK[suffix](whole)[:-cut]), f"a{suffix}"))
    assert found == whole.splitlines()[: len(found)]  # what comes before the damage is whole


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_damaged_and_other_data(suffix: str) -> None:
    with pytest.raises(BrokenShardError, match=r"is not valid (zstd|gzip) data"):
        read(b'{"text": "plain"}\n', f"a{suffix}")
    good = PACK[suffix](b"some text\n" * 50)
    with pytest.raises(BrokenShardError, match=r"is not valid (zstd|gzip) data"):
        read(good + b"trailing garbage", f"a{suffix}")


def test_a_line_that_is_too_long_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 14)
    file = io.BytesIO(b"a\n" + b"x" * (1 << 22) + b"\nb\n" + b"y" * (1 << 14) + b"\n" + b"z" * (1 << 15))
    tracemalloc.start()
    found = list(read_lines(file, "a.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [b"a", None, b"b", b"y" * (1 << 14), None]
    assert peak < 1 << 18
