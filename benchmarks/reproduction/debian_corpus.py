#!/usr/bin/env python3
"""Build a ten-domain corpus of real text, about 90 MB, from Debian 12 packages.

    python benchmarks/reproduction/debian_corpus.py --packages DIR --out FOLDER

Packages that DIR lacks are downloaded by name with `apt-get download` (about 280 MB); nothing is installed. Versions
are those that the archive serves: FOLDER/sources.json says which they were, with their checksums. The licences differ
(see each package's copyright file), so the text is for experiments on this machine, not for passing on.
"""

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import example_corpus_readers as readers
from build_example_corpus import unpack, write_shard

MIN_CHARS, MAX_CHARS = 1_000, 60_000
KERNEL_SHARE = 40  # one file in so many: the whole source has a hundred times the text that is wanted

Documents = Iterator[tuple[str, str]]


def kernel(root: Path) -> Documents:
    """C sources and headers, whole files, chosen by a checksum of their path."""
    (archive,) = (root / "usr/src").glob("linux-source-*.tar.xz")
    with tarfile.open(archive) as members:
        for member in members:
            wanted = zlib.crc32(member.name.encode()) % KERNEL_SHARE == 0
            if member.isfile() and wanted and member.name.endswith((".c", ".h")):
                content = members.extractfile(member)
                assert content is not None, "a file"
                yield member.name, content.read().decode("utf-8", "replace")


def java(root: Path) -> Documents:
    """Sources of java.base, whole files."""
    (archive,) = root.glob("usr/lib/jvm/openjdk-17/**/src.zip")
    with zipfile.ZipFile(archive) as members:
        for name in sorted(members.namelist()):
            if name.startswith("java.base/") and name.endswith(".java"):
                yield name, members.read(name).decode("utf-8", "replace")


def kjv(root: Path) -> Documents:
    """The King James Version: verses' words of a chapter, without markup and notes."""
    text = (root / "usr/share/bibledit/sources/kjv.xml").read_text(encoding="utf-8")
    for chapter in re.split(r"(?=<chapter osisID)", text)[1:]:
        name = re.search(r'osisID="([^"]+)"', chapter)
        body = re.sub(
            r"<note.*?</note>|<title.*?</title>", "", chapter.partition("</chapter>")[0], flags=re.S
        )
        words = " ".join(html.unescape(re.sub(r"<[^>]*>", "", body)).split())
        for document in readers.pack([words]):
            yield name.group(1) if name else "", document


def _manual(root: Path, folder: str) -> Documents:
    for path in sorted((root / "usr/share/man" / folder).glob("man[1-8]/*.gz")):
        if not path.is_symlink():
            page = roff_text(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
            yield from ((path.name, part) for part in readers.cut(page, MAX_CHARS))


def roff_text(page: str) -> str:
    """Return a manual page without comments and without the names of macros and fonts."""
    lines = (line for line in page.splitlines() if not re.match(r"[.']\s*\\\"", line))
    text = "\n".join(re.sub(r"^[.'][A-Za-z]{1,3}\b ?", "", line) for line in lines)
    text = re.sub(r"\\f(?:[A-Z]|\(..|\[\w*\])|\\[&/,|^]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text.replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\e", "\\"))


def manuals_en(root: Path) -> Documents:
    """English manual pages."""
    return _manual(root, ".")


def manuals_de(root: Path) -> Documents:
    """German manual pages."""
    return _manual(root, "de")


def perl(root: Path) -> Documents:
    """Perl's own documentation in POD."""
    for path in sorted(root.glob("usr/share/perl/*/**/*.pod")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from ((path.name, part) for part in readers.cut(text, MAX_CHARS))


DOMAINS: dict[str, tuple[tuple[str, ...], readers.Reader, int]] = {
    "code_c_kernel": (("linux-source-6.1",), kernel, 12_000_000),
    "code_java": (("openjdk-17-source",), java, 8_000_000),
    "dict_wordnet": (("dict-wn",), readers.wordnet, 10_000_000),
    "docs_perl": (("perl-doc",), perl, 9_000_000),
    "docs_python": (("python3.11-doc",), readers.python_docs, 12_000_000),
    "docs_sql_postgres": (("postgresql-doc-15",), readers.postgres_docs, 7_000_000),
    "man_de": (("manpages-de",), manuals_de, 9_000_000),
    "man_en": (("manpages", "manpages-dev"), manuals_en, 7_000_000),
    "math_formal_metamath": (("metamath-databases",), readers.metamath, 12_000_000),
    "religion_kjv": (("bibledit-data",), kjv, 5_000_000),
}
"""Packages, reader, and the bytes of text that are kept at most."""


def fetch(package: str, folder: Path) -> Path:
    """Return the package's file in `folder`, downloaded if it is not there."""
    if not list(folder.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return max(folder.glob(f"{package}_*.deb"))


def keep(documents: Documents, limit: int) -> list[tuple[str, str]]:
    """Drop repetitions and what is too short or too long; thin evenly to at most `limit` bytes."""
    distinct = {text: origin for origin, text in documents if len(text) >= MIN_CHARS}
    pool = [(origin, text) for text, origin in distinct.items() if len(text) <= MAX_CHARS]
    size = sum(len(text.encode()) for _, text in pool)
    count = min(len(pool), int(len(pool) * limit / max(size, 1)))
    return [pool[index * len(pool) // count] for index in range(count)]


def build(packages: Path, out: Path, domains: list[str]) -> None:
    """Write a shard for each domain, and sources.json."""
    packages.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    sources: dict[str, dict[str, str]] = {}
    for domain in domains:
        names, reader, limit = DOMAINS[domain]
        found: list[tuple[str, str]] = []
        sources[domain] = {}
        for name in names:
            file = fetch(name, packages)
            sources[domain][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            with tempfile.TemporaryDirectory(dir=packages) as scratch:
                found += reader(unpack(file, Path(scratch, "root")))
        documents = keep(iter(found), limit)
        if not documents:
            raise SystemExit(f"{', '.join(names)} gave no text for {domain}; is it of Debian 12?")
        write_shard(out / f"{domain}.jsonl.zst", domain, documents)
        size = sum(len(text.encode()) for _, text in documents)
        sys.stdout.write(f"{domain}: {len(documents)} documents, {size / 1e6:.1f} MB\n")
        sys.stdout.flush()
    (out / "sources.json").write_text(json.dumps(sources, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of downloaded packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    arguments = parser.parse_args()
    build(arguments.packages, arguments.out, arguments.domains)


if __name__ == "__main__":
    main()
