#!/usr/bin/env bash
# Checks and times kernels and training steps on an NVIDIA GPU, in less than ten minutes and without network.
#
#   benchmarks/gpu_check.sh [--dry-run]     PYTHON=python3  OUT=benchmarks/results  BUILD=build/gpu
#                                           ADAFM_CUDA_ARCHS=<the GPU's own>
#
# Needs the GPU, nvcc, cmake, and a Python with torch 2.11 or later, Triton 3.6 or later, pybind11 and pytest; for what
# concerns the trainer numpy, pillow, safetensors and tyro too. Stages, each with a time limit; the last has what is
# left. --dry-run prints them and does nothing.
#   build      the library into this tree, and the C++ tests for this GPU (a second run builds what changed)
#   cpp        the C++ tests on the GPU: CUDA kernels against a scalar reference, bit for bit
#   pytest     every test marked `gpu`, of kernels and trainer
#   sanitizer  memcheck and racecheck over the C++ kernel test; absent, refused or out of time: reported, not failed
#   op         `adafm bench op --device cuda`: times, and tables
#   step       `adafm bench step --device cuda`: training steps, CUDA graphs on and off; out of time: the pairs that
#              were finished are reported
# A stage that fails or runs out of time ends the run: timings of a tree that fails its tests are not taken.
# OUT receives gpu_environment.txt, gpu_build.log, gpu_tests.log, gpu_sanitizer.log, gpu_op.json, gpu_op.md, gpu_op.svg,
# gpu_step.json, gpu_step.md, gpu_step.svg.
# Exit code: 0 all passed, 1 something failed, 2 usage, 3 there is no GPU to check.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-benchmarks/results}"
BUILD="${BUILD:-build/gpu}"
TOTAL=570 BUILD_LIMIT=220 CPP_LIMIT=40 PYTEST_LIMIT=120 SANITIZER_LIMIT=25 OP_LIMIT=120 STEP_LIMIT=175
# Less time than this is not enough for one pair.
STEP_LEAST=60
STEP=(--cases "adafm-128,modulated-256" --ways "published,switched,leaf,graphs" --rounds 7)
TRAINER_NEEDS="numpy, PIL, safetensors, tyro"
CPP_TESTS=(kernels_test_cuda adam_test_cuda arena_test_cuda layers_test_cuda)
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"

say() { echo "gpu_check: [${SECONDS} s] $*"; }
fail() {
  echo "gpu_check: $*" >&2
  exit 1
}

case "${1:-}" in
"") ;;
--dry-run)
  echo "build      at most $BUILD_LIMIT s: cmake, libadafm.so and _C into adafm_kernels/, ${CPP_TESTS[*]}"
  echo "cpp        at most $CPP_LIMIT s: ${CPP_TESTS[*]}"
  echo "pytest     at most $PYTEST_LIMIT s: $PYTHON -m pytest -m gpu"
  echo "sanitizer  at most 2 x $SANITIZER_LIMIT s: compute-sanitizer memcheck, racecheck: ${CPP_TESTS[0]} --few"
  echo "op         at most $OP_LIMIT s: $PYTHON -m adafm_trainer.bench.op --device cuda"
  echo "step       the rest of $TOTAL s, at most $STEP_LIMIT s: $PYTHON -m adafm_trainer.bench.step --device cuda ${STEP[*]}"
  exit 0
  ;;
*)
  echo "usage: benchmarks/gpu_check.sh [--dry-run]" >&2
  exit 2
  ;;
esac

# stage NAME LIMIT LOG COMMAND...: appends to the log; shows its end where the command fails.
stage() {
  local name="$1" limit="$2" log="$3" code=0
  shift 3
  ((limit > 0)) || fail "no time is left for $name"
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1 || code=$?
  if ((code != 0)); then
    tail -n 40 "$log" >&2
    ((code == 124 || code == 137)) && fail "$name took more than $limit s, see $log"
    fail "$name failed with code $code, see $log"
  fi
}

command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; name a Python that has torch: PYTHON=... $0"
"$PYTHON" -c 'import torch' 2>/dev/null || fail "$PYTHON has no torch; name a Python that has: PYTHON=... $0"
if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: torch sees no CUDA GPU here, nothing to check" >&2
  exit 3
fi
command -v nvcc >/dev/null || fail "nvcc is not on PATH"
"$PYTHON" - <<'PY' || fail "the environment does not fit"
import importlib.util
import sys

import torch

def number(version):
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])

lacking = [name for name in ("triton", "pybind11", "pytest") if importlib.util.find_spec(name) is None]
if lacking:
    sys.exit(f"gpu_check: {sys.executable} lacks {', '.join(lacking)}")
import triton

if number(torch.__version__) < (2, 11) or number(triton.__version__) < (3, 6):
    sys.exit(f"gpu_check: torch {torch.__version__}, Triton {triton.__version__}; needs torch 2.11, Triton 3.6")
PY
SCRIPTS="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
export PATH="$PATH:$SCRIPTS"
command -v cmake >/dev/null || fail "cmake is not on PATH"

mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
rm -f "$OUT"/gpu_{build,tests,sanitizer}.log "$OUT"/gpu_{op,step}.{json,md,svg}
{
  date -u +"%Y-%m-%dT%H:%M:%SZ"
  git rev-parse HEAD 2>/dev/null || echo "no git commit"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv 2>/dev/null || echo "no nvidia-smi"
  nvcc --version | tail -n 2
  "$PYTHON" -c 'import platform, torch, triton; print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)'
} | tee "$OUT/gpu_environment.txt"

say "build, at most $BUILD_LIMIT s"
CAPABILITY="$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')"
GENERATOR=()
if command -v ninja >/dev/null; then
  GENERATOR=(-G Ninja)
fi
ends=$((SECONDS + BUILD_LIMIT))
ADAFM_CUDA=1 stage configuring $((ends - SECONDS)) "$OUT/gpu_build.log" \
  cmake -S . -B "$BUILD" "${GENERATOR[@]}" -DADAFM_GPU_TESTS=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
  -DADAFM_CUDA_ARCHS="${ADAFM_CUDA_ARCHS:-$CAPABILITY}"
stage building $((ends - SECONDS)) "$OUT/gpu_build.log" \
  cmake --build "$BUILD" --parallel "$(nproc)" --target adafm _C "${CPP_TESTS[@]}"

say "C++ tests, at most $CPP_LIMIT s"
ends=$((SECONDS + CPP_LIMIT))
for name in "${CPP_TESTS[@]}"; do
  stage "$name" $((ends - SECONDS)) "$OUT/gpu_tests.log" "$BUILD/tests/cpp/$name"
  echo "$name: $(tail -n 1 "$OUT/gpu_tests.log")"
done

say "pytest, at most $PYTEST_LIMIT s"
others="adafm_trainer"
if ! "$PYTHON" -c 'import hypothesis' 2>/dev/null; then
  others='adafm_trainer\|import hypothesis\|from hypothesis'
  echo "hypothesis is not installed, the tests that use it are left out"
fi
mapfile -t files < <(grep -L "$others" tests/test_*.py)
trainer=1
if ! lacking="$("$PYTHON" -c "import $TRAINER_NEEDS" 2>&1)"; then
  trainer=0
  echo "the trainer's tests and the step benchmark are left out: ${lacking##*$'\n'}"
else
  mapfile -t -O "${#files[@]}" files < <(grep -l adafm_trainer tests/test_*.py | xargs grep -l 'mark\.gpu')
fi
stage pytest "$PYTEST_LIMIT" "$OUT/gpu_tests.log" "$PYTHON" -m pytest -m gpu -p no:cacheprovider "${files[@]}"
summary="$(grep -E '[0-9]+ passed' "$OUT/gpu_tests.log" | tail -n 1)" || fail "no GPU test ran, see $OUT/gpu_tests.log"
echo "$summary"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    say "compute-sanitizer $tool, at most $SANITIZER_LIMIT s"
    code=0
    part="$(mktemp)"
    timeout -k 5 "$SANITIZER_LIMIT" compute-sanitizer --tool "$tool" --error-exitcode 99 \
      "$BUILD/tests/cpp/${CPP_TESTS[0]}" --few >"$part" 2>&1 || code=$?
    { echo "== $tool, code $code"; cat "$part"; } >>"$OUT/gpu_sanitizer.log"
    if ((code == 0)); then
      echo "$tool: clean"
    elif ((code == 124 || code == 137)); then
      echo "$tool: not finished in $SANITIZER_LIMIT s, no verdict"
    elif ((code == 99)) || grep -q "^FAILED" "$part"; then
      tail -n 40 "$part" >&2
      fail "compute-sanitizer $tool found errors, see $OUT/gpu_sanitizer.log"
    else
      echo "$tool: refused here (code $code): $(grep -v '^$' "$part" | tail -n 1)"
    fi
    rm -f "$part"
  done
else
  echo "compute-sanitizer is not installed, left out" | tee "$OUT/gpu_sanitizer.log"
fi

say "op benchmark, at most $OP_LIMIT s"
left=$((TOTAL - SECONDS < OP_LIMIT ? TOTAL - SECONDS : OP_LIMIT))
code=0
timeout -k 5 "$left" "$PYTHON" -m adafm_trainer.bench.op --device cuda --seconds $((left - 30)) --compile-seconds 45 \
  --json "$OUT/gpu_op.json" >"$OUT/gpu_op.md" || code=$?
((code == 0)) || fail "the op benchmark ended with code $code"
"$PYTHON" benchmarks/render.py "$OUT/gpu_op.json" --chart "$OUT/gpu_op.svg" >/dev/null
cat "$OUT/gpu_op.md"

left=$((TOTAL - SECONDS < STEP_LIMIT ? TOTAL - SECONDS : STEP_LIMIT))
if ((trainer == 0)); then
  say "step benchmark: left out, see above"
elif ((left < STEP_LEAST)); then
  say "step benchmark: left out, $left s are left and one pair needs $STEP_LEAST"
else
  say "step benchmark, at most $left s"
  code=0
  timeout -k 5 "$left" "$PYTHON" -m adafm_trainer.bench.step --device cuda "${STEP[@]}" --json "$OUT/gpu_step.json" \
    >/dev/null || code=$?
  if ((code == 124 || code == 137)); then
    echo "the step benchmark is not finished in $left s: reported are the pairs that were"
  elif ((code != 0)); then
    fail "the step benchmark ended with code $code"
  fi
  if [[ -f "$OUT/gpu_step.json" ]]; then
    "$PYTHON" benchmarks/render.py "$OUT/gpu_step.json" --chart "$OUT/gpu_step.svg" >"$OUT/gpu_step.md"
    cat "$OUT/gpu_step.md"
  fi
fi
say "done, results in $OUT"
