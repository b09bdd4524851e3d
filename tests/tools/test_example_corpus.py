"""The corpus that the repository ships is complete, licensed, balanced and unchanged."""

import hashlib
import json
import re
from pathlib import Path

import example_corpus_readers as readers
import pytest
import zstandard
from build_example_corpus import DOMAINS, thin, write_shard

CORPUS = Path(__file__).parents[2] / "examples/corpus"
README = (CORPUS / "README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([a-z_]+) \| (\d+ \|.*) \|$", README, flags=re.MULTILINE))


def lines_of(path: Path) -> bytes:
    return zstandard.ZstdDecompressor().decompress(path.read_bytes())


def records_of(domain: str) -> list[dict]:
    lines = lines_of(CORPUS / f"{domain}.jsonl.zst").decode("utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict]]:
    return {path.name.split(".")[0]: records_of(path.name.split(".")[0]) for path in CORPUS.glob("*.zst")}


def bytes_of(records: list[dict]) -> int:
    return sum(len(record["text"].encode()) for record in records)


def test_domains_and_size(corpus):
    assert set(corpus) == set(DOMAINS)
    assert len(corpus) >= 8
    sizes = [bytes_of(records) for records in corpus.values()]
    assert 4_000_000 <= sum(sizes) <= 10_000_000
    assert max(sizes) < 1.2 * min(sizes), "the domains are not balanced"


def test_documents_are_in_redpajama_form_and_distinct(corpus):
    texts = set()
    for domain, records in corpus.items():
        assert len(records) >= 150
        for record in records:
            assert set(record) == {"text", "meta"}
            assert set(record["meta"]) == {"source", "origin"}
            assert record["meta"]["source"] == domain
            assert readers.MIN_CHARACTERS <= len(record["text"]) <= readers.MAX_CHARACTERS
            texts.add(record["text"])
    assert len(texts) == sum(map(len, corpus.values()))


def test_every_domain_has_its_row_and_its_licence(corpus):
    assert set(ROWS) == set(corpus)
    for domain, records in corpus.items():
        documents, size, package, upstream, licence = ROWS[domain].split(" | ")
        assert int(documents) == len(records)
        assert float(size) == pytest.approx(bytes_of(records) / 1e6, abs=0.006)  # two decimals
        assert package
        assert upstream
        assert re.match(r"public domain|MIT|WordNet|PostgreSQL|PSF|CC0", licence)
        assert (CORPUS / "licenses" / f"{domain}.txt").stat().st_size > 80


def test_shards_are_unchanged():
    for line in (CORPUS / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256(lines_of(CORPUS / f"{name}.zst")).hexdigest() == digest, name


def test_a_shard_is_the_same_bytes_each_time(tmp_path):
    documents = [("a", "one " * 200), ("b", "two " * 200)]
    digests = [write_shard(tmp_path / name, "d", documents) for name in ("1", "2")]
    assert digests[0] == digests[1] == hashlib.sha256(lines_of(tmp_path / "1")).hexdigest()
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert write_shard(tmp_path / "3", "d", documents[::-1]) != digests[0]


def test_pack_keeps_all_words_within_the_limit():
    blocks = ["alpha beta", "gamma. " * 20, "delta"]
    packed = list(readers.pack(blocks, limit=50))
    assert all(len(document) <= 50 for document in packed)
    assert " ".join(packed).split() == " ".join(blocks).split()
    assert list(readers.pack(["a", "", "b"], limit=50)) == ["a\n\nb"]


def test_cut_without_any_boundary_still_ends():
    assert list(readers.cut("x" * 25, limit=10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_thin_spreads_over_the_source_and_drops_short_and_repeated():
    long = [(str(i), f"{i:03d}" + "x" * 597) for i in range(10)]
    kept = thin([*long, ("short", "s"), ("again", long[0][1])], target=3000)
    assert [text[:3] for _, text in kept] == ["000", "002", "004", "006", "008"]


def test_html_text_leaves_out_the_navigation_and_keeps_code_lines():
    page = (
        '<head><title>T</title></head><body><div class="navheader"><div>Prev</div></div>'
        "<p>Some\n   <b>bold</b>\u00a0text</p><pre>a\n  b</pre></body>"
    )
    assert readers.html_text(page) == "Some bold text\n\na\n  b"


def test_metamath_keeps_statements_and_drops_proofs(tmp_path):
    path = tmp_path / "usr/share/metamath/databases/set.mm"
    path.parent.mkdir(parents=True)
    path.write_text(
        "header $( Declare the primitive constant symbols $)\n\n  ${\n    $d x y $.\n"
        "    $( A rule.  (Contributed by NM (and others),\n       1-Jan-2000.) $)\n"
        "    rule $p |- ( ph -> ps ) $=\n      ( wi ) AB $( a note $) CD $.\n  $}\n"
        "$( old @p |- ph @= EF @. $)\n"
    )
    ((_, text),) = readers.metamath(tmp_path)
    assert "$( A rule. $)\nrule $p |- ( ph -> ps ) $." in text
    assert "$( old @p |- ph $. $)" in text
    assert not re.search("AB|CD|EF|note|NM|header|x y", text)
