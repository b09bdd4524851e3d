"""The sha256 that this process knows: what is remembered, what is read again, and who finds it out."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from megatron_l0moe.runs import digests

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


@pytest.fixture(autouse=True)
def forgotten() -> None:
    digests.stop()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is really read."""
    seen: list[object] = []
    compute = digests.compute

    def noting(source: Path | int) -> str:
        seen.append(source)
        return compute(source)

    monkeypatch.setattr(digests, "compute", noting)
    return seen


def test_a_file_is_read_once_whatever_its_name(tmp_path: Path, reads: list[object]) -> None:
    file = tmp_path / "a" / "partial"
    file.parent.mkdir()
    file.write_bytes(b"abc")
    assert digests.begin(file).result() == ABC
    file.parent.rename(tmp_path / "b")
    moved = tmp_path / "b" / "whole"
    (tmp_path / "b" / "partial").rename(moved)
    assert digests.of({"x": moved, "y": moved}) == {"x": ABC, "y": ABC}
    assert len(reads) == 1


def test_a_change_is_read_again(tmp_path: Path, reads: list[object]) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abd")
    os.utime(file, ns=(0, 1))
    digests.begin(file).result()
    file.write_bytes(b"abc")  # the same size
    assert digests.begin(file).result() == ABC
    assert len(reads) == 2


def test_what_is_written_is_hashed_only_where_it_is_wanted(tmp_path: Path, reads: list[object]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"x")
    digests.written(two)
    with digests.following():
        digests.written(one)
        one.rename(tmp_path / "three")  # perhaps before the thread comes to it
    assert digests.begin(tmp_path / "three").result() == ABC
    assert len(reads) == 1


def test_remembered(tmp_path: Path, reads: list[object]) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    digests.remember(file, "known")
    assert digests.of({"f": file}) == {"f": "known"}
    assert reads == []


def _in_child(file: Path, queue: "multiprocessing.Queue[str]") -> None:
    queue.put(digests.begin(file).result())


def test_a_forked_child_starts_threads_of_its_own(tmp_path: Path) -> None:
    """Those of the parent are not there, so a child that used them would wait for ever."""
    file, other = tmp_path / "f", tmp_path / "g"
    file.write_bytes(b"abc")
    other.write_bytes(b"")
    digests.begin(other).result()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(file, queue))
    child.start()
    assert queue.get(timeout=60) == ABC
    child.join(60)


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """Files wait by their names, not open: a checkpoint of many ranks has thousands."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 400 if soft > 400 else soft + 50
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    files = {str(k): tmp_path / str(k) for k in range(count)}
    for name, file in files.items():
        file.write_text(name)
    begun = [digests.begin(file) for file in files.values()]
    if opened:
        assert len(os.listdir("/proc/self/fd")) < opened + 50
    assert [one.result() for one in begun] == [hashlib.sha256(name.encode()).hexdigest() for name in files]
