# Sourced by the other scripts: makes .venv in the project's folder and installs into it what is asked for.
# shellcheck shell=bash

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# set_up FILE...: installs the requirements in FILE..., unless just these were installed before.
set_up() {
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    python=
  done
  if [ -z "$python" ]; then
    say "needs Python 3.11 or newer with its venv module (Debian: apt-get install python3 python3-venv)"
    exit 1
  fi
  local stamp
  stamp=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(b"".join(open(n, "rb").read() for n in sys.argv[1:])).hexdigest())' "$@")
  [ -x .venv/bin/python ] && [ "$(cat ".venv/installed-$#" 2>/dev/null)" = "$stamp" ] && return
  if [ ! -x .venv/bin/python ]; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  say "installing $*"
  local options=()
  local file
  for file in "$@"; do options+=(-r "$file"); done
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${options[@]}"
  printf '%s\n' "$stamp" >".venv/installed-$#"
}
