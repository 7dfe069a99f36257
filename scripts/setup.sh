# Sourced by the other scripts: creates .venv in the project's folder and installs requirements into it.
# shellcheck shell=bash

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# set_up FILE...: installs the requirements in FILE..., unless they were installed before and have not changed.
#
# While .venv is being changed, .venv.lock is not empty. After an interrupted change the next start creates .venv again:
# it may lack pip, and pip accepts a half-installed package as installed.
set_up() {
  trap 'exit 130' INT # otherwise bash continues if the program that it waits for has handled Ctrl-C
  exec 9>>.venv.lock
  # pip inherits the lock, in case it outlives this script; the server does not.
  if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "waiting for another script that sets up .venv"
    flock 9
  fi
  local fits='import sys; sys.exit(sys.version_info < (3, 11))'
  if [ -s .venv.lock ] || ! .venv/bin/python -c "$fits" 2>/dev/null; then
    make_venv
  fi
  local file options=() changed=
  for file in "$@"; do
    options+=(-r "$file")
    cmp -s "$file" ".venv/installed/$file" || changed=1
  done
  if [ -n "$changed" ]; then
    # .venv may come from another tool, without pip.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
    say "installing $*"
    echo installing >.venv.lock
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check "${options[@]}"; then
      # pip has failed by itself (no network, no such version): the old packages are still usable.
      : >.venv.lock
      exit 1
    fi
    for file in "$@"; do
      mkdir -p ".venv/installed/$(dirname "$file")"
      cp "$file" ".venv/installed/$file"
    done
    : >.venv.lock
  fi
  exec 9>&-
  trap - INT
}

make_venv() {
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    "$python" -c "import ensurepip, venv; $fits" 2>/dev/null && break
    python=
  done
  if [ -z "$python" ]; then
    say "needs Python 3.11 or newer with its venv module (Debian: apt-get install python3 python3-venv)"
    exit 1
  fi
  say "making .venv with $("$python" --version)"
  echo making >.venv.lock
  "$python" -m venv --clear .venv
}
