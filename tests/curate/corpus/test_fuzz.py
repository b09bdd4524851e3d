"""Random damage to shards and indexes: the answer is data or one sentence, never another error, never an endless loop.

Cases that once failed are kept as examples.
"""

import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datatrove.io import get_datafolder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_l0moe.curate.corpus.catalog import DocumentFilter
from megatron_l0moe.curate.corpus.readers import JsonLinesReader, ParquetRowsReader, ShardReader
from megatron_l0moe.curate.corpus.redpajama_v2 import RedPajamaV2Reader
from megatron_l0moe.curate.corpus.shard_files import open_corpus
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.recipe.sections import FilterSection, SignalRange

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PACK = {"": bytes, ".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress}
JSON = st.recursive(
    # No subnormal floats: another test of the same process may have set its processor to flush them to zero.
    st.none() | st.booleans() | st.floats(allow_subnormal=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["text", "raw_content", "meta", "source", "language", "id", "quality_signals"])
RECORDS = st.dictionaries(FIELDS, JSON, max_size=4)
DAMAGE = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4
)


def damaged(content: bytes, damage: list[tuple[int, bytes, int]]) -> bytes:
    """Replace a few bytes at each place by others."""
    for place, new, removed in damage:
        at = place % (len(content) + 1)
        content = content[:at] + new + content[at + removed :]
    return content


def read(reader: type[ShardReader], name: str, content: bytes) -> tuple[list[Any], ShardReader]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        instance = reader(get_datafolder(folder))
        rules = DocumentFilter(FilterSection(min_chars=3, languages=["en"]))
        documents = list(instance.read_rows(name))
        for document in documents:
            document.text.encode()
            rules.reason(document)
        instance.quarantine.save(Path(folder, "quarantine.jsonl"))
        return documents, instance


@FUZZ
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".jsonl.zst", ".jsonl.gz"]))
@example(content=b"\n\n\x00\xff\n", suffix=".jsonl")
@example(content=b"(\xb5/\xfd", suffix=".jsonl.zst")
@example(content=b"\x1f\x8b", suffix=".jsonl.gz")
def test_any_bytes(content: bytes, suffix: str) -> None:
    documents, reader = read(JsonLinesReader, f"a{suffix}", content)
    if not reader.quarantine.broken_shards and suffix == ".jsonl":
        lines = [line for line in io.BytesIO(content).readlines() if not line.isspace()]
        assert len(documents) + reader.quarantine.reasons.total() == len(lines)


@FUZZ
@given(records=st.lists(RECORDS, max_size=5), damage=DAMAGE, suffix=st.sampled_from(sorted(PACK)))
@example(records=[{"text": "x"}], damage=[(3, b"\xff", 0)], suffix="")
def test_damaged_json_lines(records: list[Any], damage: list[Any], suffix: str) -> None:
    content = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    whole, reader = read(JsonLinesReader, f"a.jsonl{suffix}", PACK[suffix](content))
    assert len(whole) + reader.quarantine.reasons.total() == len(records)
    assert not reader.quarantine.broken_shards
    read(JsonLinesReader, f"a.jsonl{suffix}", damaged(PACK[suffix](content), damage))


@FUZZ
@given(texts=st.lists(st.none() | st.text(), min_size=1, max_size=5), damage=DAMAGE)
def test_damaged_parquet(texts: list[str | None], damage: list[Any]) -> None:
    file = io.BytesIO()
    columns = {
        "text": pa.array(
            [None if t is None else t.encode("utf-8", "ignore").decode() for t in texts], pa.string()
        )
    }
    pq.write_table(pa.table(columns), file, row_group_size=2)
    documents, reader = read(ParquetRowsReader, "a.parquet", file.getvalue())
    assert len(documents) + reader.quarantine.reasons.total() == len(texts)
    try:
        read(ParquetRowsReader, "a.parquet", damaged(file.getvalue(), damage))
    except L0MoEError as error:
        assert "column" in str(error)  # noqa: PT017 - both outcomes are right


SIGNALS = st.dictionaries(
    st.just("rps_doc_word_count"), JSON | st.lists(st.lists(JSON, max_size=3), max_size=2)
)
RATINGS = st.fixed_dictionaries(
    {
        "id": st.integers(0, 6).map(lambda row: f"2023-06/0000/en_head.json.gz/{row}") | JSON,
        "quality_signals": SIGNALS | JSON,
    }
)


@FUZZ
@given(ratings=st.lists(RATINGS, max_size=6), damage=DAMAGE)
def test_any_signals(ratings: list[Any], damage: list[Any]) -> None:
    """All documents come out, each with the signals of its own row or none."""
    tag = "2023-06/0000/en_head"
    rules = DocumentFilter(FilterSection(quality_signals={"rps_doc_word_count": SignalRange(min=1.0)}))
    packed = gzip.compress(b"".join(json.dumps(rating).encode() + b"\n" for rating in ratings))
    for content in (packed, damaged(packed, damage)):
        with tempfile.TemporaryDirectory() as folder:
            for name, data in (
                (f"documents/{tag}.json.gz", gzip.compress(b'{"raw_content": "some text"}\n' * 5)),
                (f"quality_signals/{tag}.signals.json.gz", content),
            ):
                Path(folder, name).parent.mkdir(parents=True)
                Path(folder, name).write_bytes(data)
            reader = open_corpus(folder).reader(with_signals=True)
            assert isinstance(reader, RedPajamaV2Reader)
            documents = list(reader.read_rows(f"documents/{tag}.json.gz"))
            assert [document.metadata["line"] for document in documents] == [1, 2, 3, 4, 5]
            for document in documents:
                try:
                    rules.reason(document)
                except L0MoEError as error:
                    assert "quality_signals" in str(error)  # noqa: PT017 - both outcomes are right


INDEX_FILES = [
    "moe.ccm.json",
    "moe.ccm.docs.npy",
    "moe.ccm.samples.npy",
    "iter_001/shard_00000.bin",
    "iter_001/shard_00000.idx",
]


@pytest.fixture
def good_index(toy_index) -> tuple[Path, dict[str, bytes]]:
    prefix, _ = toy_index(clusters=2, order=(1,), rounds=4)
    return prefix, {name: (prefix.parent / name).read_bytes() for name in INDEX_FILES}


@FUZZ
@given(name=st.sampled_from(INDEX_FILES), damage=DAMAGE, verify=st.booleans())
@example(name="moe.ccm.samples.npy", damage=[(0, b"", 1 << 20)], verify=False)
@example(name="moe.ccm.docs.npy", damage=[(10, b"", 1)], verify=False)
@example(name="moe.ccm.json", damage=[(0, b"\xff", 0)], verify=False)
@example(name="moe.ccm.json", damage=[(0, b"[" * 100_000, 0)], verify=False)
def test_damaged_index(good_index, name: str, damage: list[Any], verify: bool) -> None:
    prefix, files = good_index
    for other, content in files.items():
        (prefix.parent / other).write_bytes(damaged(content, damage) if other == name else content)
    changed = (prefix.parent / name).read_bytes() != files[name]
    try:
        dataset = CurriculumDataset(prefix, verify=verify)
        if verify and not name.endswith(".json"):
            assert not changed  # every other change is seen by a checksum
        for i in range(min(len(dataset), 20)):
            assert len(dataset[i]["tokens"]) == dataset.header.seq_length
        dataset.check_all()
    except L0MoEError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
        assert changed, error  # noqa: PT017 - both outcomes are right


KEYS = ["version", "kind", "num_domains", "iterations", "seq_length", "order", "d_ds", "sequences_per_domain",
        "batches", "rotate", "tokenizer_sha256", "vocab_size", "eod", "shards", "samples",
        "iteration_start_samples"]  # fmt: skip


@FUZZ
@given(key=st.sampled_from(KEYS), value=JSON | st.lists(JSON, max_size=3))
@example(key="seq_length", value=1 << 40)
@example(key="samples", value=8.0)
def test_any_header(good_index, key: str, value: Any) -> None:
    prefix, files = good_index
    header = json.loads(files["moe.ccm.json"]) | {key: value}
    del header["checksum"]  # it would refuse every change
    (prefix.parent / "moe.ccm.json").write_text(json.dumps(header))
    try:
        dataset = CurriculumDataset(prefix, verify=False, vocab_size=5000)
        dataset[0]
        dataset.check_all()
    except L0MoEError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
