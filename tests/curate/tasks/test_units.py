"""Units: where they are cut, and that only a whole one counts as done."""

from pathlib import Path

import numpy as np
import pytest

from megatron_l0moe.curate.tasks.units import (
    UnitPlan,
    cut_at_shards,
    published,
    read_record,
    read_records,
    record_file,
    write_array,
    write_record,
)


@pytest.mark.parametrize(
    ("size", "ends"), [(1, [2, 3, 6, 7]), (3, [3, 6, 7]), (4, [6, 7]), (99, [7]), (0.5, [2, 3, 6, 7])]
)
def test_cuts_lie_at_the_ends_of_shards(size: float, ends: list[int]) -> None:
    shards = np.array([0, 0, 3, 4, 4, 4, 9])
    assert cut_at_shards(shards, np.ones(7), size).tolist() == ends


def test_cut_by_weight_and_nothing() -> None:
    assert cut_at_shards(np.arange(4), np.array([5, 1, 1, 9]), 5).tolist() == [1, 4]
    assert cut_at_shards(np.arange(4), np.array([1, 1, 9, 1]), 5).tolist() == [3, 4]
    assert cut_at_shards(np.empty(0, int), np.empty(0), 5).tolist() == []


def test_plans_join_and_are_read_back(tmp_path: Path) -> None:
    first = UnitPlan.of(np.array([4, 5, 6]), np.array([2, 3]), iteration=0, limit=7)
    second = UnitPlan.of(np.array([1]), np.array([1]), iteration=1, first_shard=3, limit=8)
    nothing = UnitPlan.of(np.empty(0, int), np.empty(0, int), iteration=2)
    UnitPlan.joined([first, nothing, second]).save(tmp_path)
    plan = UnitPlan.load(tmp_path)
    assert [plan.items_of(unit).tolist() for unit in range(3)] == [[4, 5], [6], [1]]
    assert [plan.units[name].tolist() for name in ("iteration", "shard", "limit")] == [
        [0, 0, 1], [0, 1, 3], [7, 7, 8],
    ]  # fmt: skip
    assert [plan.digest(0), plan.digest(1)] == [first.digest(0), first.digest(1)]


def test_the_digest_is_of_everything_that_a_unit_does() -> None:
    def digest(items=(1, 2), iteration=0, first_shard=0, limit=5) -> str:
        ends = np.array([len(items)])
        return UnitPlan.of(
            np.array(items), ends, iteration=iteration, first_shard=first_shard, limit=limit
        ).digest(0)

    others = [digest((1, 3)), digest((1,)), digest(iteration=1), digest(first_shard=1), digest(limit=6)]
    assert len({digest(), *others}) == 6
    assert digest() == digest()


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    write_array(tmp_path / "a.npy", np.arange(4))
    write_record(tmp_path, tmp_path, 0, "plan", [tmp_path / "a.npy"], {"documents": 4})
    return tmp_path


def test_a_whole_unit(unit: Path) -> None:
    record = read_record(unit, unit, 0, "plan")
    assert record
    assert record.content == {"documents": 4}
    assert list(record.files) == ["a.npy"]
    plan = UnitPlan.of(np.array([1]), np.array([1]))
    assert read_records(unit, unit, plan, [0]) == [None]  # another plan


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, record: file.unlink(),
        lambda file, record: file.write_bytes(file.read_bytes()[:-1]),
        lambda file, record: change(file),
        lambda file, record: record.unlink(),
        lambda file, record: record.write_text(record.read_text()[:-9]),
        lambda file, record: record.write_text(record.read_text().replace('"plan": "plan"', '"plan": "other"')),
        lambda file, record: record.write_text("[]"),
    ],
    ids=["missing", "cut short", "one bit", "no record", "half a record", "other plan", "no mapping"],
)  # fmt: skip
def test_a_unit_that_is_not_whole(unit: Path, damage) -> None:
    damage(unit / "a.npy", record_file(unit, 0))
    assert read_record(unit, unit, 0, "plan") is None


def test_files_appear_together_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    files = tmp_path / "s.bin", tmp_path / "s.idx"
    with published(*files, folder=tmp_path) as hidden:
        for file in hidden:
            file.write_text("x")
        assert not any(file.exists() for file in files)
        assert hidden[0].with_suffix("") == hidden[1].with_suffix("")  # Megatron wants one prefix
    assert sorted(tmp_path.iterdir()) == list(files)
    with pytest.raises(ZeroDivisionError), published(tmp_path / "t", folder=tmp_path) as (partial,):
        _write_and_fail(partial)
    assert sorted(tmp_path.iterdir()) == list(files)


def _write_and_fail(file: Path) -> None:
    file.write_text("x")
    raise ZeroDivisionError
