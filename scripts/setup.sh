# Sourced by the other scripts: makes .venv in the project's folder and installs into it what is asked for.
# shellcheck shell=bash

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# set_up FILE...: installs the requirements in FILE..., unless each was installed before as it is now.
set_up() {
  local fits='import sys; sys.exit(sys.version_info < (3, 11))'
  if ! .venv/bin/python -c "$fits" 2>/dev/null; then
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
    "$python" -m venv --clear .venv
  fi
  local file options=() changed=
  for file in "$@"; do
    options+=(-r "$file")
    cmp -s "$file" ".venv/installed/$file" || changed=1
  done
  [ -n "$changed" ] || return 0
  say "installing $*"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${options[@]}"
  for file in "$@"; do
    mkdir -p ".venv/installed/$(dirname "$file")"
    cp "$file" ".venv/installed/$file"
  done
}
