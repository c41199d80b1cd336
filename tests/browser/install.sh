#!/usr/bin/env bash
# A browser for `make test-browser`: the one that is there, else Debian's, else the one that Playwright brings.
set -euo pipefail
if [ -n "${BROWSER_PATH:-}" ] || command -v chromium >/dev/null || command -v google-chrome >/dev/null; then
    exit 0
fi
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && apt-get install -qq -y chromium && exit 0
fi
exec "$1" -m playwright install --with-deps chromium
