#!/bin/sh
# Run the tests with the oldest supported torch and timm, and with the newest, each in a virtual environment of its own.
#
#   scripts/test_versions.sh [oldest|newest]    both, unless one is named
#
# The environments stay in VENVS (a folder below $TMPDIR) for the next time; the newest is brought up to date.
set -eu
cd "$(dirname "$0")/.."
VENVS=${VENVS:-${TMPDIR:-/tmp}/psaq-vit-versions}
PYTHON=${PYTHON:-python3}

for end in ${1:-oldest newest}; do
    case "$end" in
    oldest) versions="torch==2.11.* torchvision==0.26.* timm==1.0.31" ;;
    newest) versions="--upgrade torch torchvision timm" ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
    [ -d "$VENVS/$end" ] || "$PYTHON" -m venv "$VENVS/$end"
    # shellcheck disable=SC2086
    "$VENVS/$end/bin/pip" install -q $versions -r requirements.txt -r requirements-dev.txt
    echo "== $end: $("$VENVS/$end/bin/python" -c 'import utils.run.environment as e; print(e.versions())')"
    "$VENVS/$end/bin/python" -m pytest -q -n 2
done
