"""Vectors in several files: the same rows as one array, whatever is asked for; damage is named."""

from pathlib import Path

import numpy as np
import pytest

from megatron_l0moe.curate.embedding import VectorShards
from megatron_l0moe.errors import L0MoEError


@pytest.fixture
def shards(tmp_path: Path) -> tuple[list[Path], np.ndarray]:
    whole = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float16)
    files = []
    for number, part in enumerate((whole[:7], whole[7:7], whole[7:20], whole[20:])):
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], part)
    return files, whole


def test_rows_are_those_of_one_array(shards) -> None:
    files, whole = shards
    vectors = VectorShards(files)
    assert (vectors.shape, len(vectors)) == ((23, 4), 23)
    for wanted in (slice(0, 23), slice(5, 9), slice(20, 99), slice(3, 3), np.array([22, 0, 7, 7, 6])):
        assert vectors[wanted].dtype == np.float16
        np.testing.assert_array_equal(vectors[wanted], whole[wanted])


def test_selected_rows(shards) -> None:
    files, whole = shards
    rows = np.random.default_rng(1).permutation(23)[:15]
    vectors = VectorShards(files, rows)
    assert vectors.shape == (15, 4)
    np.testing.assert_array_equal(vectors[2:9], whole[rows[2:9]])
    np.testing.assert_array_equal(vectors[np.array([14, 0])], whole[rows[[14, 0]]])


def test_bad_files(shards, tmp_path: Path) -> None:
    files, _ = shards
    with pytest.raises(L0MoEError, match=r"none\.npy cannot be read"):
        VectorShards([tmp_path / "none.npy"])
    np.save(tmp_path / "other.npy", np.zeros((2, 5), dtype=np.float16))
    with pytest.raises(
        L0MoEError, match=r"other\.npy are float16 \[n, 5\], but .*0\.npy is float16 \[n, 4\]"
    ):
        VectorShards([*files, tmp_path / "other.npy"])
    np.save(tmp_path / "ints.npy", np.zeros((2, 4), dtype=np.int64))
    with pytest.raises(L0MoEError, match=r"ints\.npy are int64 \[2, 4\], not float16 or float32"):
        VectorShards([tmp_path / "ints.npy"])
    vectors = VectorShards(files)
    files[2].write_bytes(files[2].read_bytes()[:-8])
    vectors[:5]  # another file
    with pytest.raises(L0MoEError, match=r"2\.npy cannot be read"):
        vectors[8:9]
