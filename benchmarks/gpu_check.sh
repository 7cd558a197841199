#!/usr/bin/env bash
# Checks and times the kernels on an NVIDIA GPU. Needs the GPU, nvcc, a Python with torch 2.11 or later and this
# project's other requirements; no network.
#
#   benchmarks/gpu_check.sh            PYTHON=python3  OUT=benchmarks/results  ADAFM_CUDA_ARCHS=<the GPU's own>
#
# Builds into this tree, runs the tests marked `gpu`, then compute-sanitizer where it is installed, and last prints a
# table of timings; timings of a tree that fails its tests are not taken. Results go to OUT: gpu_environment.txt,
# gpu_build.log, gpu_tests.log, gpu_sanitizer.log, gpu_table.md, gpu_table.json.
# Exit code: 0 all passed, 1 something failed, 3 there is no GPU to check.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-benchmarks/results}"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"

fail() {
  echo "gpu_check: $*" >&2
  exit 1
}

if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  "$PYTHON" -c 'import torch' 2>/dev/null || fail "$PYTHON has no torch; name a Python that has: PYTHON=... $0"
  echo "gpu_check: torch sees no CUDA GPU here, nothing to check" >&2
  exit 3
fi
command -v nvcc >/dev/null || fail "nvcc is not on PATH"
"$PYTHON" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' ||
  fail "torch 2.11 or later is needed"

mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
{
  date -u +"%Y-%m-%dT%H:%M:%SZ"
  git rev-parse HEAD 2>/dev/null || echo "no git commit"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv 2>/dev/null || true
  nvcc --version | tail -n 2
  "$PYTHON" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)'
} | tee "$OUT/gpu_environment.txt"

echo "gpu_check: building"
CAPABILITY="$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')"
ADAFM_CUDA=1 ADAFM_CUDA_ARCHS="${ADAFM_CUDA_ARCHS:-$CAPABILITY}" \
  "$PYTHON" setup.py build_ext --inplace >"$OUT/gpu_build.log" 2>&1 || {
  tail -n 40 "$OUT/gpu_build.log" >&2
  fail "the build failed, see $OUT/gpu_build.log"
}

echo "gpu_check: testing"
"$PYTHON" -m pytest -m gpu -p no:cacheprovider 2>&1 | tee "$OUT/gpu_tests.log" || fail "tests failed, see $OUT/gpu_tests.log"
grep -Eq '[0-9]+ passed' "$OUT/gpu_tests.log" || fail "no GPU test ran"

if command -v compute-sanitizer >/dev/null; then
  echo "gpu_check: compute-sanitizer"
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/gpu_table.py --check-only
  done >"$OUT/gpu_sanitizer.log" 2>&1 || fail "compute-sanitizer found errors, see $OUT/gpu_sanitizer.log"
else
  echo "gpu_check: compute-sanitizer is not installed, left out"
fi

"$PYTHON" benchmarks/gpu_table.py --json "$OUT/gpu_table.json" | tee "$OUT/gpu_table.md"
