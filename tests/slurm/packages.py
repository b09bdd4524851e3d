"""Slurm's programs from Debian's packages, unpacked into a folder: nothing is installed on the machine."""

import fcntl
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "slurm"
WANTED = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
DAEMONS = {
    "slurmctld": "slurmctld-wlm",
    "slurmd": "slurmd-wlm",
    "slurmstepd": "slurmstepd-wlm",
    "munged": "munged",
}
"""The names of the programs in the packages; the plain names are links that only an installation makes."""
LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}


class UnavailableError(Exception):
    """This machine cannot run the test cluster; the message says why."""


@dataclass(frozen=True)
class Programs:
    """The unpacked packages."""

    root: Path

    @property
    def libraries(self) -> Path:
        """Their folder of shared libraries."""
        return self.plugins.parent

    @property
    def plugins(self) -> Path:
        """Slurm's PluginDir, where its own library lies as well."""
        return next((self.root / "usr" / "lib").glob("*/slurm-wlm"))

    def write_shims(self, folder: Path, config: Path) -> None:
        """Write a script for each program that starts it on its own libraries.

        The loader is told where they are by an option: LD_LIBRARY_PATH would go on into the jobs.
        """
        path = f"{self.libraries}:{self.plugins}"
        binaries = {name: self.root / "usr" / "bin" / name for name in CLIENTS}
        binaries |= {name: self.root / "usr" / "sbin" / file for name, file in DAEMONS.items()}
        for name, binary in binaries.items():
            shim = folder / name
            shim.write_text(
                "#!/bin/sh\n"
                f"export SLURM_CONF={config}\n"
                f'exec {LOADERS[platform.machine()]} --library-path {path} --argv0 {name} {binary} "$@"\n',
                encoding="utf-8",
            )
            shim.chmod(0o755)


def fetch(cache: Path = CACHE) -> Programs:
    """Return the programs, downloaded (4 MB) and unpacked the first time; `cache`/versions.txt names them.

    Raises:
        UnavailableError: no Debian tools, an unknown processor, or the packages cannot be had.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise UnavailableError(f"there is no {tool}, and Slurm's programs come from Debian's packages")
    if platform.machine() not in LOADERS:
        raise UnavailableError(f"no loader is known for the processor {platform.machine()}")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:  # several sessions may start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "versions.txt").is_file():
            _download(cache)
            _unpack(cache)
    return Programs(cache / "root")


def _download(cache: Path) -> None:
    """Fetch the wanted packages and those that they need and this machine lacks."""
    debs = cache / "debs"
    shutil.rmtree(debs, ignore_errors=True)
    debs.mkdir()
    plan = _apt("install", "--simulate", "--no-install-recommends", *WANTED, cwd=cache)
    lacking = re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
    _apt("download", "--quiet", *sorted({*WANTED, *lacking}), cwd=debs)


def _unpack(cache: Path) -> None:
    root = cache / "root"
    shutil.rmtree(root, ignore_errors=True)
    versions = []
    for deb in sorted((cache / "debs").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", deb, root], check=True)
        shown = subprocess.run(
            ["dpkg-deb", "--show", deb], check=True, capture_output=True, text=True
        )  # name, tab, version
        versions.append(shown.stdout.strip().replace("\t", " "))
    # Written last: it says that the folder is whole.
    (cache / "versions.txt").write_text("\n".join(versions) + "\n", encoding="utf-8")


def _apt(*words: str, cwd: Path) -> str:
    done = subprocess.run(["apt-get", *words], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UnavailableError(f"apt-get {words[0]} gives no Slurm packages ({' '.join(reason)})")
    return done.stdout
