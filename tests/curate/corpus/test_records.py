"""Source domains as published corpora name them, by every reader alike, and by `data.domain_key`."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curated import scan_corpus
from datatrove.io import get_datafolder

from megatron_l0moe.curate.corpus.readers import RecordsReader, domain_of, language_of
from megatron_l0moe.curate.corpus.redpajama_v2 import RedPajamaV2Reader
from megatron_l0moe.errors import L0MoEError

KNOWN = [
    ({"source": "cc/2019-30/en_middle_0053.json.gz/line405796", "pred_label": "x"}, "cc"),
    ({"meta": {"source": "github", "language": [{"name": "C"}]}}, "github"),
    ({"meta": {"redpajama_set_name": "RedPajamaStackExchange"}}, "RedPajamaStackExchange"),
    ({"meta": {"pile_set_name": "Pile-CC"}}, "Pile-CC"),
    ({"source": "mC4", "url": "https://example.org/x", "timestamp": "2020"}, "mC4"),
    ({"source": "common-crawl", "metadata": {"length": 3}, "added": "2023"}, "common-crawl"),
    ({"meta": {"timestamp": "2023"}, "red_pajama_subset": "arxiv"}, "arxiv"),
    ({"metadata": {"source": "gutenberg"}, "id": "1"}, "gutenberg"),
    ({"meta": {"source": "arxiv/1"}, "source": "other"}, "arxiv"),
    ({"meta": {"source": "https://example.org/1"}, "source": "web"}, "web"),
    ({"meta": None, "source": "web"}, "web"),
    ({"source": "https://example.org/page/1"}, "unknown"),
    ({"meta": {"source": ""}}, "unknown"),
    ({"meta": {"source": 3}}, "unknown"),
    ({"meta": "text"}, "unknown"),
    ({"source": "half a \ud800 pair"}, "unknown"),
    ({"url": "https://example.org/", "dump": "CC-MAIN-2013-20", "language": "en"}, "unknown"),
]


@pytest.mark.parametrize(("record", "domain"), KNOWN, ids=lambda value: str(value)[:40])
def test_known_forms(record: dict[str, Any], domain: str) -> None:
    assert domain_of(record, "a.jsonl") == domain
    as_text = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in record.items()}
    assert domain_of(as_text, "a.jsonl") == domain  # as Parquet files often hold it


@pytest.mark.parametrize(
    ("shard", "root", "domain"),
    [
        ("arxiv/arxiv_000.jsonl", "RedPajama", "arxiv"),
        ("data/Wikipedia/wiki.jsonl", "", "wikipedia"),
        ("book.jsonl", "x", "book"),
        ("common_crawl_sample.jsonl", "x", "common_crawl"),
        ("part_0.jsonl", "arxiv", "arxiv"),
        ("train/part_0.jsonl", "x", "unknown"),
        ("bookkeeping.jsonl", "arxiv2", "unknown"),
    ],
)
def test_parts_of_redpajama(shard: str, root: str, domain: str) -> None:
    """arXiv, books and Wikipedia of v1 name no source; the folder does."""
    record = {"meta": {"arxiv_id": "2012.00001", "language": "en"}}
    assert domain_of(record, shard, root=root) == domain
    assert domain_of({"source": "web"}, shard, root=root) == "web"  # control: a named source wins


@pytest.mark.parametrize(
    ("key", "domain"),
    [
        ("subset", "web"),
        ("meta.subset", "maths"),
        ("deep.er.name", "x"),
        ("url", "example.org"),
        ("label", "3"),
        ("flat.name", "flat"),
        ("folder", "one"),
        ("nothing.here", "unknown"),
        ("meta", "unknown"),
    ],
)
def test_domain_key(key: str, domain: str) -> None:
    record = {
        "subset": "web", "meta": {"subset": "maths/algebra", "source": "other"}, "label": 3, "flat.name": "flat",
        "deep": json.dumps({"er": {"name": "x"}}), "url": "https://user@Example.org:80/page?x",
    }  # fmt: skip
    assert domain_of(record, "one/two/a.jsonl", key=key) == domain


def test_language() -> None:
    assert language_of({"meta": {"language": "en"}, "language": "de"}) == "en"
    assert language_of({"meta": json.dumps({"language": ""}), "language": "de"}) == "de"
    assert language_of({"metadata": {"language": "fr"}}) == "fr"
    for other in ({"meta": {"language": [{"name": "C", "bytes": 3}]}}, {}, {"meta": "en"}):
        assert language_of(other) == ""


def domains(folder: Path, shard: str, key: str | None = None) -> list[str]:
    reader = RecordsReader(get_datafolder(str(folder)), key)
    found = [document.metadata["domain"] for document in reader.read_rows(shard)]
    assert not reader.quarantine.reasons
    assert not reader.quarantine.broken_shards
    return found


def test_every_reader_alike(tmp_path: Path, write_lines) -> None:
    """The same records as JSON lines, as a table of structs, of JSON text, of maps; and RedPajama v2 with a key."""
    metas = [{"redpajama_set_name": name, "subset": f"s{name}"} for name in ("RedPajamaC4", "RedPajamaBook")]
    records = [{"text": "some text", "meta": meta} for meta in metas]
    write_lines(tmp_path / "a.jsonl", records)
    kinds = {
        "struct": pa.array(metas),
        "json": pa.array([json.dumps(meta) for meta in metas]),
        "map": pa.array([list(meta.items()) for meta in metas], pa.map_(pa.string(), pa.string())),
    }
    for name, kind in kinds.items():
        pq.write_table(pa.table({"content": ["some text"] * 2, "meta": kind}), tmp_path / f"{name}.parquet")
    for name in ("a.jsonl", *(f"{kind}.parquet" for kind in kinds)):
        assert domains(tmp_path, name) == ["RedPajamaC4", "RedPajamaBook"]
        assert domains(tmp_path, name, "meta.subset") == ["sRedPajamaC4", "sRedPajamaBook"]
    v2 = tmp_path / "documents/2023-06/0000/en_head.json.gz"
    v2.parent.mkdir(parents=True)
    v2.write_bytes(
        gzip.compress(json.dumps({"raw_content": "x", "bucket": "head", "language": "en"}).encode())
    )
    for key, domain in ((None, "en"), ("bucket", "head"), ("folder", "2023-06")):
        reader = RedPajamaV2Reader(get_datafolder(str(tmp_path)), key, with_signals=False)
        (document,) = reader.read_rows(v2.relative_to(tmp_path).as_posix())
        assert document.metadata["domain"] == domain


def test_shards_with_misleading_names(tmp_path: Path, write_lines) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x", "meta": {"source": "web"}}])
    pq.write_table(pa.table({"text": ["y"], "source": ["table"]}), tmp_path / "b.jsonl")
    (tmp_path / "c.parquet").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "d.jsonl.gz").write_bytes(lines.read_bytes())
    found = {name: domains(tmp_path, name) for name in ("a.jsonl", "b.jsonl", "c.parquet", "d.jsonl.gz")}
    assert found == {"a.jsonl": ["web"], "b.jsonl": ["table"], "c.parquet": ["web"], "d.jsonl.gz": ["web"]}


def test_a_tenth_without_a_domain_is_said(tmp_path: Path, write_lines, caplog) -> None:
    named = [{"text": f"named {n}", "subset": "a"} for n in range(9)]
    write_lines(tmp_path / "few/a.jsonl", [*named, {"text": "unnamed"}])
    assert scan_corpus(tmp_path / "few", domain_key="subset").domains == ["a", "unknown"]
    assert "no source domain" not in caplog.text
    write_lines(tmp_path / "more/a.jsonl", [*named, {"text": "unnamed"}, {"text": "another"}])
    scan_corpus(tmp_path / "more", domain_key="subset")
    assert "2 of 11 documents have no source domain and count as 'unknown'" in caplog.text
    with pytest.raises(
        L0MoEError, match=r"data\.domain_key \(meta\.x\) names the source domain of none of the 11"
    ):
        scan_corpus(tmp_path / "more", domain_key="meta.x")
    assert scan_corpus(tmp_path, domain_key="folder").domains == ["few", "more"]
