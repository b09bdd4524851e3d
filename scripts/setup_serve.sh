#!/usr/bin/env bash
# Make the serving environment in .venv-serve: vLLM's CPU build, its transformers, and beside it transformers 4.57.
#
# It stands apart because vLLM pins torch and transformers to other versions than the training environment has.
# Packages and versions: constraints-serve.txt. .venv-serve/.complete holds a hash of what it was made from and is
# written last; when it fits, nothing is done, otherwise the environment is made anew (2 to 5 minutes).
# PYTHON=... chooses the interpreter (3.11 to 3.14).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-serve
OLD_TRANSFORMERS=(transformers==4.57.6 huggingface-hub==0.36.0 tokenizers==0.22.1)
PIP_VERSION=26.3

fail() {
  printf 'Set-up of the serving environment failed: %s\n' "$*" >&2
  exit 1
}

usable() {
  "$1" -c 'import sys, venv, ensurepip, ssl, ctypes; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1
}

find_python() {
  local python
  if [ -n "${PYTHON:-}" ] && ! usable "$PYTHON"; then
    fail "PYTHON=$PYTHON is not a Python of version 3.11 to 3.14 that runs and has venv, ensurepip and ssl; unset it or name another one."
  fi
  for python in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if usable "$python"; then
      command -v "$python"
      return 0
    fi
  done
  # The training environment knows where it found its own.
  python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)' 2>/dev/null) && usable "$python" && printf '%s\n' "$python" && return 0
  fail "no Python of version 3.11 to 3.14 with venv, ensurepip and ssl was found; set PYTHON=/path/to/python3.12."
}

fingerprint() {
  { cat constraints-serve.txt; printf '%s\n' "${OLD_TRANSFORMERS[@]}"; } | sha256sum | cut -c1-64
}

if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.complete" 2>/dev/null)" = "$(fingerprint)" ]; then exit 0; fi

python=$(find_python) || exit 1
printf 'Making %s with %s (%s); 3.5 GB with the CPU build of torch, about 8 GB with the general one.\n' "$VENV" "$python" "$("$python" -V)"
rm -rf "$VENV"
"$python" -m venv "$VENV" || fail "$python could not make an environment in $VENV (see above)."
pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
{
  "${pip[@]}" install -qq --upgrade "pip==$PIP_VERSION" &&
    # With its dependencies: the general build of torch brings its CUDA libraries, the CPU build none.
    "${pip[@]}" install -qq --constraint constraints-serve.txt torch &&
    "${pip[@]}" install -qq --no-deps --requirement constraints-serve.txt &&
    "${pip[@]}" install -qq --no-deps --target "$VENV/transformers-4.57" "${OLD_TRANSFORMERS[@]}"
} || fail "pip could not install the packages (see above); run this again when the cause is gone."
fingerprint >"$VENV/.complete"
printf 'The serving environment in %s is ready.\n' "$VENV"
