#!/usr/bin/env bash
# What an accelerator does, checked against the CPU and then measured: benchmarks/gpu.sh [check|train|generate|products|tiles|attention ...]
# Each part takes under ten minutes; without arguments all do, in this order. What was measured goes to
# benchmarks/results/gpu_PART.json, the tests' output and what failed to LOG (default: gpu.log). PYTHON names an
# interpreter that has puna's dependencies (default: python3); COMMIT the commit where git is not there; SECONDS_LEFT how
# long the parts may take together (default: an hour): what would begin later is left out, and said.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
git rev-parse HEAD >/dev/null 2>&1 || export COMMIT=${COMMIT:-unknown} # a machine that was sent files alone
python=${PYTHON:-python3} log=${LOG:-gpu.log} last=${SECONDS_LEFT:-3600}

measure() {
	if ((SECONDS >= last)); then
		echo "left out, for want of time: $*" | tee -a "$log"
		return
	fi
	timeout "${limit:-120}" "$python" benchmarks/gpu.py "$@" >>"$rows" 2>>"$log" || echo "failed: $*" | tee -a "$log"
}

check() { # file by file at the same time where pytest-xdist is there: most of the time kernels are compiled
	workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n 6 --dist loadfile")
	timeout 300 "$python" -m pytest -m gpu -vv -p no:cacheprovider --continue-on-collection-errors $workers \
		tests/model tests/train tests/generate tests/quantized >>"$log" 2>&1 || echo "a path is wrong: see $log"
}

train() {
	for case in "7b" "34b width" "34b whole, 34 layers of 48 recomputed" "34b whole" "7b, documents of 512" \
		"7b, rows of 16384" "34b width, rows of 16384" \
		"34b width, one of eight parts" "34b width, one of eight parts, eager"; do
		measure train "$case"
	done
}

generate() {
	measure generate codellama-7b
	measure generate codellama-34b --scheme fp8
	measure generate codellama-34b
	for scheme in int8 int4 fp8; do measure generate codellama-7b --scheme $scheme; done
	limit=240 measure generate codellama-7b --compile
}

products() { measure products; }

tiles() { measure tiles; }

attention() { measure attention; }

for part in "${@:-check train generate products tiles attention}"; do
	for part in $part; do
		if [ "$part" = check ]; then
			check
			continue
		fi
		rows=$(mktemp)
		measure limits
		"$part"
		"$python" benchmarks/gpu.py gather "$part" "$rows"
	done
done
