#!/usr/bin/env bash
# Make, repair or trust the environment in .venv.
#
# .venv/.complete holds a hash of what the environment was made from (constraints.txt, pyproject.toml, the Python
# version, the extras). It is written last. When it fits and every installed file is still there, nothing is done.
# PYTHON=... chooses the interpreter; EXTRAS=gpu,dev takes the GPU packages instead of the CPU ones.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
MARKER=$VENV/.complete
EXTRAS=${EXTRAS:-cpu,dev}
PIP_VERSION=26.3
ROOTS=${L0MOE_SETUP_ROOTS:-} # another root of the file system, for the test of this script

say() { printf '%s\n' "$*"; }
fail() {
  printf 'Set-up failed: %s\n' "$*" >&2
  exit 1
}

# An interpreter counts when it really runs, is new enough and can make an environment with pip.
usable() {
  "$1" -c 'import sys, venv, ensurepip, ssl, ctypes, bz2; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# Python 3.12 first: Megatron-Core's wheel carries its compiled data helpers for it.
candidates() {
  local version pattern path
  [ -z "${PYTHON:-}" ] || printf '%s\n' "$PYTHON"
  for version in 3.12 3.13; do
    command -v "python$version" || true
    for pattern in \
      "$HOME/.pyenv/versions/$version.*/bin/python3" \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version.*/bin/python3" \
      "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}/cpython-$version.*/bin/python3" \
      "$HOME/miniconda3/envs/*/bin/python$version" \
      "$ROOTS/usr/bin/python$version" "$ROOTS/usr/local/bin/python$version" "$ROOTS/opt/*/bin/python$version"; do
      # The pattern is meant to expand; one that matches nothing stays as it is and is not executable.
      for path in $pattern; do [ ! -x "$path" ] || printf '%s\n' "$path"; done
    done
  done
  command -v python3 || true
}

find_python() {
  local path
  if [ -n "${PYTHON:-}" ] && ! usable "$PYTHON"; then
    fail "PYTHON=$PYTHON is not a Python of version 3.12 or newer that runs and has venv, ensurepip and ssl; unset it or name another one."
  fi
  while IFS= read -r path; do
    if usable "$path"; then
      printf '%s\n' "$path"
      return 0
    fi
  done < <(candidates)
  fail "no Python of version 3.12 or newer with venv, ensurepip and ssl was found; install one (Debian and Ubuntu: apt install python3.12-venv; elsewhere: uv python install 3.12) or set PYTHON=/path/to/python3.12."
}

fingerprint() { # of the environment that $1 is the Python of
  { cat constraints.txt pyproject.toml; "$1" -c 'import sys; print(sys.version)'; printf '%s\n' "$EXTRAS"; } | sha256sum | cut -c1-64
}

trusted() {
  [ -f "$MARKER" ] && [ -x "$VENV/bin/python" ] || return 1
  local wanted
  wanted=$(fingerprint "$VENV/bin/python" 2>/dev/null) || return 1
  [ "$(cat "$MARKER")" = "$wanted" ] || return 1
  "$VENV/bin/python" -I scripts/check_environment.py >/dev/null 2>&1
}

create() {
  rm -rf "$VENV"
  local python
  python=$(find_python)
  say "Making $VENV with $python ($("$python" -V 2>&1)); the packages are large (6.9 GB), this takes a few minutes."
  "$python" -m venv "$VENV" || fail "$python could not make an environment in $VENV (see above)."
}

install() {
  local pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
  "${pip[@]}" install -qq --upgrade "pip==$PIP_VERSION" || return 1
  "${pip[@]}" install -qq --constraint constraints.txt --editable ".[$EXTRAS]"
}

# Install again what the check found damaged, one package a line as NAME==VERSION.
mend() {
  local broken
  if broken=$("$VENV/bin/python" -I scripts/check_environment.py 2>/dev/null); then return 0; fi
  [ -n "$broken" ] || return 1
  say "Installing damaged packages again: $(tr '\n' ' ' <<<"$broken")"
  # shellcheck disable=SC2086 # one word for each package
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --force-reinstall --no-deps $broken &&
    "$VENV/bin/python" -I scripts/check_environment.py >/dev/null
}

trusted && exit 0

repairable() {
  [ -x "$VENV/bin/python" ] && usable "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

rm -f "$MARKER"
if repairable; then
  say "$VENV is not complete or was made for other versions; repairing it."
  if ! { install && mend; }; then
    say "Repairing $VENV did not work; making it anew."
    create
  fi
else
  create
fi
{ install && mend; } || fail "pip could not install the packages (see above); run this again when the cause is gone, nothing of it is trusted until then."
fingerprint "$VENV/bin/python" >"$MARKER.new"
mv "$MARKER.new" "$MARKER"
say "The environment in $VENV is ready."
