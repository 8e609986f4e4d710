#!/usr/bin/env bash
# The picture of README.md and docs/report.md, from a measured run of reports/h200; needs Chromium.
# From the root of the repository: bash docs/figures/report.sh
set -euo pipefail

run=reports/h200/study-1.5b/best-k2
page=$(mktemp --suffix .html)
plan=${PLAN:-.venv/bin/plan}
"$plan" report "$run/plan.json" --run "$run" --out "$page"
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,1030 \
  --screenshot=docs/figures/report.png "file://$page"
rm "$page"
