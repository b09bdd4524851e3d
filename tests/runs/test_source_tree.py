"""The state of a real git tree, and of a package that lies in none."""

import subprocess
from pathlib import Path

import pytest

from megatron_l0moe.runs import stage_folder


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=toy", "-c", "user.email=toy@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one commit; the package is its folder `package`."""
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text("A = 1\n")
    (tmp_path / "README").write_text("read\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    monkeypatch.setattr(stage_folder, "HERE", module)
    return tmp_path


def test_clean_tree(tree: Path) -> None:
    commit = stage_folder.commit()
    assert commit is not None
    assert len(commit) == 40
    assert stage_folder.changes() == b""
    assert stage_folder.untracked() == []


def test_changes_make_the_tree_again(tree: Path, tmp_path: Path) -> None:
    (tree / "package" / "module.py").write_text("A = 2\n")
    (tree / "README").write_bytes(b"not utf-8: \xff\n")  # outside the package, and in some other encoding
    git(tree, "add", "README")
    (tree / "new.py").write_text("B = 3\n")
    assert str(stage_folder.commit()).endswith("+changes")
    assert stage_folder.untracked() == ["new.py"]
    patch = tmp_path / "kept.patch"
    patch.write_bytes(stage_folder.changes())
    git(tree, "checkout", "HEAD", "--", ".")
    git(tree, "apply", str(patch))
    assert (tree / "package" / "module.py").read_text() == "A = 2\n"
    assert (tree / "README").read_bytes() == b"not utf-8: \xff\n"


def test_wheel_in_somebody_elses_tree(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tree / "site-packages" / "module.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(stage_folder, "HERE", installed)
    assert stage_folder.commit() is None
    assert stage_folder.changes() == b""
    assert stage_folder.untracked() == []


def test_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stage_folder.commit() is None
    assert stage_folder.changes() == b""
