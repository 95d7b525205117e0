#!/usr/bin/env bash
# Checks every path of an accelerator against the CPU, then measures one: benchmarks/gpu.sh [LOG]. Under ten minutes.
# What was measured goes to benchmarks/results/gpu.json; the tests' output and what failed to LOG (default: gpu.log).
# PYTHON names an interpreter that has puna's dependencies (default: python3); COMMIT the commit where git is not there.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3} log=${1:-gpu.log} rows=$(mktemp)

measure() { timeout 120 "$python" benchmarks/gpu.py "$@" >>"$rows" 2>>"$log" || echo "failed: $*" | tee -a "$log"; }

timeout 240 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/model tests/train tests/generate tests/quantized >>"$log" 2>&1 ||
	echo "a path is wrong: see $log"
measure limits
measure attention
measure generate codellama-7b
measure generate codellama-34b
measure generate codellama-34b --scheme fp8
measure generate codellama-7b --scheme int4
for case in "7b" "34b width" "34b whole" "34b whole, 34 layers of 48 recomputed" "7b, documents of 512" "7b, rows of 16384" \
	"34b width, rows of 16384"; do
	measure train "$case"
done
"$python" benchmarks/gpu.py gather "$rows"
