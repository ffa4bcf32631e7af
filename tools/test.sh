#!/usr/bin/env bash
# Run pytest in a temporary directory of its own, then prove that nothing was left behind.
set -uo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d /tmp/sf-XXXXXX)
trap 'rm -rf "$scratch"' EXIT
# The path is short: Unix socket addresses end at 108 bytes.
TMPDIR=$scratch .venv/bin/python -m pytest "$@"
status=$?
.venv/bin/python tools/check_leftovers.py "$scratch" || status=1
exit "$status"
