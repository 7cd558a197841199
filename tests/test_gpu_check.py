"""benchmarks/gpu_check.sh with tools that only pretend: its stages, verdicts and exit codes. No GPU takes part."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adafm_trainer.bench import step
from adafm_trainer.bench.step_cases import cases

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
RESULTS = {
    "gpu_environment.txt", "gpu_build.log", "gpu_tests.log", "gpu_sanitizer.log", "gpu_op.json", "gpu_op.md",
    "gpu_op.svg", "gpu_step.json", "gpu_step.md", "gpu_step.svg",
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("bash", "timeout")), reason="needs bash and timeout"
)

# A Python that has a GPU: it answers what the script asks, by what stands in its arguments.
PYTHON = """#!/usr/bin/env bash
case "$*" in
*is_available*) exit "${NO_GPU:-0}" ;;
*get_device_capability*) echo 90 ;;
*get_path*) echo /nowhere ;;
*"import hypothesis"*) exit "${NO_HYPOTHESIS:-0}" ;;
*"import numpy"*) [[ -z "${LACKS:-}" ]] || { printf 'Traceback\nNo module named %s\n' "$LACKS" >&2; exit 1; } ;;
*platform*) echo python 3, torch 2.99 ;;
*"-m pytest"*) echo "files: $*"; echo "${PYTEST:-5 passed}"; [[ "${PYTEST:-5 passed}" != *failed* ]] ;;
*bench.op*) while [[ $1 != --json ]]; do shift; done; echo '{}' >"$2"; echo "| the table |" ;;
*bench.step*)
  while [[ $1 != --json ]]; do shift; done
  [[ -n "${STEP_FINISHES_NONE:-}" ]] || echo '{}' >"$2"
  exit "${STEP_CODE:-0}" ;;
*render.py*gpu_step*) while [[ $1 != --chart ]]; do shift; done; echo '<svg/>' >"$2"; echo "| the steps |" ;;
*render.py*) while [[ $1 != --chart ]]; do shift; done; echo '<svg/>' >"$2" ;;
-) cat >/dev/null ;;
*"import torch"*) ;;
*) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""
# Building makes the C++ tests.
CMAKE = """#!/usr/bin/env bash
echo "cmake $*"
[[ -z "${BROKEN_BUILD:-}" ]] || { echo "error: no such kernel"; exit 1; }
mkdir -p "$BUILD/tests/cpp"
for name in kernels_test_cuda adam_test_cuda arena_test_cuda layers_test_cuda; do
  printf '#!/usr/bin/env bash\\n%s\\n' "${CPP_TEST:-echo 7 results equal the reference}" >"$BUILD/tests/cpp/$name"
  chmod +x "$BUILD/tests/cpp/$name"
done
"""
SANITIZER = """#!/usr/bin/env bash
echo "========= COMPUTE-SANITIZER"
echo "${SAYS:-========= ERROR SUMMARY: 0 errors}"
exit "${SANITIZER_CODE:-0}"
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script with pretended tools; environment variables say what goes wrong."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("python3", PYTHON), ("cmake", CMAKE), ("compute-sanitizer", SANITIZER), ("nvcc", "echo 13")):
        file = tools / name
        file.write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def run(*arguments, without=(), **environment):
        for name in without:
            (tools / name).unlink()
        variables = {
            "PATH": f"{tools}:/usr/bin:/bin", "OUT": str(tmp_path / "out"), "BUILD": str(tmp_path / "build"),
            **environment,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=variables, capture_output=True, text=True, timeout=120
        )
        out = tmp_path / "out"
        return done.returncode, done.stdout + done.stderr, {p.name for p in out.glob("*")} if out.is_dir() else set()

    return run


def test_everything_passes(check):
    code, printed, files = check()
    assert code == 0, printed
    assert files == RESULTS and len(files) <= 11
    stages = ("build", "C++ tests", "pytest", "memcheck", "racecheck", "op benchmark", "step benchmark", "done")
    places = [printed.index(f" s] {stage}" if "check" not in stage else f"sanitizer {stage}") for stage in stages]
    assert places == sorted(places)
    assert "memcheck: clean" in printed and "racecheck: clean" in printed and "5 passed" in printed
    assert printed.index("| the table |") < printed.index("| the steps |") < printed.index("done, results in")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"BROKEN_BUILD": "1"}, "configuring failed with code 1"),
        ({"CPP_TEST": "echo FAILED modulate_cuda; exit 1"}, "kernels_test_cuda failed with code 1"),
        ({"PYTEST": "1 failed, 4 passed"}, "pytest failed with code 1"),
        ({"PYTEST": "5 skipped"}, "no GPU test ran"),
        ({"SANITIZER_CODE": "99", "SAYS": "ERROR SUMMARY: 3 errors"}, "memcheck found errors"),
        ({"SANITIZER_CODE": "1", "SAYS": "FAILED modulate_cuda"}, "memcheck found errors"),
    ],
)
def test_a_failure_ends_the_run_before_timing(check, wrong, says):
    code, printed, files = check(**wrong)
    assert code == 1 and says in printed, printed
    assert not files & {"gpu_op.json", "gpu_op.md", "gpu_step.json", "gpu_step.md"}


def test_files_of_kernels_and_trainer_are_tested(check, tmp_path):
    check()
    (ran,) = [line for line in (tmp_path / "out" / "gpu_tests.log").read_text().splitlines() if "files: " in line]
    names = {Path(word).name for word in ran.split() if word.endswith(".py")}
    assert {"test_plan.py", "test_modulate.py", "test_graphs.py", "test_torchrun.py"} <= names
    marked = {p.name for p in (ROOT / "tests").glob("test_*.py") if "@pytest.mark.gpu" in p.read_text()}
    assert marked <= names and "test_report.py" not in names


def test_without_the_trainers_packages(check, tmp_path):
    code, printed, files = check(LACKS="safetensors")
    assert code == 0 and files == {name for name in RESULTS if "step" not in name}
    assert "the trainer's tests and the step benchmark are left out: No module named safetensors" in printed
    assert "test_graphs.py" not in (tmp_path / "out" / "gpu_tests.log").read_text()


@pytest.mark.parametrize("none", ["", "1"])
def test_a_step_benchmark_out_of_time_keeps_what_it_finished(check, none):
    code, printed, files = check(STEP_CODE="124", STEP_FINISHES_NONE=none)
    assert code == 0 and "the step benchmark is not finished in" in printed
    assert ("gpu_step.md" in files) == ("| the steps |" in printed) == (not none)


def test_a_wrong_step_fails(check):
    code, printed, files = check(STEP_CODE="1", STEP_FINISHES_NONE="1")
    assert code == 1 and "the step benchmark ended with code 1" in printed and "gpu_step.md" not in files


def test_the_step_benchmark_knows_what_it_is_asked_for():
    (asked,) = re.findall(r"^STEP=\((.*)\)$", SCRIPT.read_text(), re.M)
    given = step.parser().parse_args(shlex.split(asked))
    assert set(given.cases.split(",")) <= {case.name for case in cases("cuda", quick=False)}
    assert set(given.ways.split(",")) <= set(step.short_ways("cuda")) and "graphs" in given.ways


def test_a_sanitizer_that_is_refused_is_reported(check):
    code, printed, files = check(SANITIZER_CODE="1", SAYS="Error: no permission for the debugger interface")
    assert code == 0, printed
    assert "memcheck: refused here (code 1): Error: no permission" in printed
    assert files == RESULTS


def test_a_sanitizer_that_is_absent_is_reported(check):
    code, printed, files = check(without=["compute-sanitizer"])
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin"):
        pytest.skip("there is a compute-sanitizer in /usr/bin")
    assert code == 0 and "compute-sanitizer is not installed, left out" in printed
    assert files == RESULTS


def test_without_hypothesis(check):
    code, printed, files = check(NO_HYPOTHESIS="1")
    assert code == 0 and "hypothesis is not installed" in printed and files == RESULTS


def test_without_a_gpu(check):
    code, printed, files = check(NO_GPU="1")
    assert code == 3 and "no CUDA GPU here" in printed and not files


def test_dry_run_and_usage(check):
    code, printed, files = check("--dry-run")
    assert code == 0 and not files
    assert [line.split()[0] for line in printed.splitlines()] == [
        "build", "cpp", "pytest", "sanitizer", "op", "step",
    ]  # fmt: skip
    assert check("--what")[0] == 2


def test_time_limits_leave_ten_minutes():
    limits = {name: int(value) for name, value in re.findall(r"\b([A-Z_]+)=(\d+)\b", SCRIPT.read_text())}
    stages = limits["BUILD_LIMIT"] + limits["CPP_LIMIT"] + limits["PYTEST_LIMIT"] + 2 * limits["SANITIZER_LIMIT"]
    assert stages + limits["OP_LIMIT"] < limits["TOTAL"] < 10 * 60 - 20
    assert limits["STEP_LEAST"] < limits["STEP_LIMIT"] < 3 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_this_machine_has_no_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and not (tmp_path / "out").exists()
