#!/usr/bin/env bash
# All fault tests, the slow ones too, and what they did as the table of docs/reliability.md. Takes pytest's arguments; without any it takes about an hour.
#
#   KTO_FAULT_LEDGER  file that the tests add their counts to; default: a new one. Give one to put several runs into one table.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh

if [ -z "${KTO_FAULT_LEDGER:-}" ]; then
    KTO_FAULT_LEDGER=$(mktemp --tmpdir kto-faults.XXXXXX)
fi
export KTO_FAULT_LEDGER
tests=(tests/faults tests/unit/test_faults.py tests/unit/test_bad_inputs.py tests/unit/test_fuzz.py)
echo "fault tests: python -m pytest ${tests[*]} $*; ledger: $KTO_FAULT_LEDGER"
failed=0
python -m pytest "${tests[@]}" "$@" || failed=$?
touch "$KTO_FAULT_LEDGER"
python -m tests.faults.table "$KTO_FAULT_LEDGER" docs/reliability.md
exit "$failed"
