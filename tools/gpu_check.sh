#!/usr/bin/env bash
# What a machine with an NVIDIA GPU can tell, in under 8 minutes: kernels and the hybrid against the
# CPU, memory against the budget, compute-sanitizer, speed over budgets. Everything is written to
# one file.
#
#     tools/gpu_check.sh [RESULTS] [MODEL.gguf ...]
#
# RESULTS: default build/gpu-check-DATE.md.  Models: default are synthetic ones, 7b and a Falcon-40b
# cut to 12 layers, made in build/ (random weights), which takes longer. $PYTHON: one that has
# powerinfer with the extras test and cuda12 or cuda13 (default: .venv/bin/python). Exit code 1 if a
# check failed, or was not run because the time was over.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
PYTEST=("$PYTHON" -m pytest -q -o faulthandler_timeout=60)
mkdir -p build
RESULTS=${1:-build/gpu-check-$(date -u +%Y-%m-%d).md}
shift || true
failed=0
left=480  # seconds for all checks; making models is not counted

say() { echo "$*" | tee -a "$RESULTS"; }

# check NAME SECONDS COMMAND...: the end of its output goes into the results.
check() {
    local name=$1 seconds=$2 log code=0 started=$SECONDS
    shift 2
    if ((left <= 0)); then
        failed=1
        say "" "## $name: not run, the time is over"
        return
    fi
    ((seconds > left)) && seconds=$left
    log=$(mktemp)
    timeout "$seconds" "$@" >"$log" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=1
    ((left -= SECONDS - started))
    say "" "## $name: exit code $code, $((SECONDS - started)) s"
    { echo; sed 's/.*\r//; s/^/    /' "$log" | tail -n "${LINES_KEPT:-12}"; } | tee -a "$RESULTS"
    rm -f "$log"
}

: >"$RESULTS"
say "# GPU check, $(date -u '+%Y-%m-%d %H:%M') UTC, commit $(git rev-parse --short HEAD 2>/dev/null)"
say "" "    $(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader)"
LINES_KEPT=40 check "what is found" 60 "$PYTHON" -m powerinfer doctor

CUSIM=gpu check "kernels against the reference" 150 "${PYTEST[@]}" -n 4 \
    tests/test_cuda_{gemv,ffn,ffn_gemm,attention,elementwise,sample}.py
LINES_KEPT=40 check "tests on the GPU" 150 \
    "${PYTEST[@]}" -rP -m gpu tests/test_cuda_device.py tests/test_gpu.py

# Few tests, since every access is checked: each kernel of a prompt and of a token runs in them.
# The tool waits for every launch; so must the engine, or it would wait for itself.
SOME="test_logits_as_on_the_cpu and predicted or test_graphs"
export CUDA_LAUNCH_BLOCKING=1
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        check "compute-sanitizer $tool" 100 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${PYTEST[@]}" -x -m gpu -k "$SOME" tests/test_gpu.py
    done
else
    say "" "## compute-sanitizer: not on this machine"
fi
unset CUDA_LAUNCH_BLOCKING

if [ $# = 0 ]; then
    for model in 7b:build/7b.gguf: falcon-40b:build/falcon.gguf:--layers=12; do
        IFS=: read -r shape file layers <<<"$model"
        # shellcheck disable=SC2086
        [ -e "$file" ] || "$PYTHON" -m powerinfer.tools.synth "$shape" -o "$file" $layers >/dev/null 2>&1
        set -- "$@" "$file"
    done
    # Dense and in f16: enough bytes a token for the memory of a large card.
    [ -e build/7b.f16.gguf ] || "$PYTHON" -m powerinfer.tools.synth 7b -o build/7b.f16.gguf \
        --type f16 --predictor-type f16 --head-type f16 >/dev/null 2>&1
    # One graph of 80 layers, each waiting for the CPU: does launching it return?
    [ -e build/deep.gguf ] ||
        "$PYTHON" -m powerinfer.tools.synth 1b --layers 80 -o build/deep.gguf >/dev/null 2>&1
    LINES_KEPT=6 check "1b in 80 layers, 1.5 GiB" 90 "$PYTHON" -m powerinfer bench \
        -m build/deep.gguf --vram-budget 1.5 -p 0 -n 64 -b 1 -r 3 --md
    LINES_KEPT=6 check "7b in f16, all on the GPU, dense" 90 "$PYTHON" -m powerinfer bench \
        -m build/7b.f16.gguf --backend cuda --dense -p 512 -n 64 -b 1 -r 3 --md
fi
for model in "$@"; do
    for budget in 0 1.5 3 8; do  # GiB; 0: the CPU alone
        LINES_KEPT=6 check "$(basename "$model"), $budget GiB" 60 \
            "$PYTHON" -m powerinfer bench -m "$model" --vram-budget "$budget" \
            -p 512 -n 64 -b 1 -r 3 --md
        [ "$budget" = 0 ] || LINES_KEPT=20 check "plan of $(basename "$model"), $budget GiB" 30 \
            "$PYTHON" -m powerinfer plan -m "$model" --vram-budget "$budget"
    done
done
say "" "failed: $failed"
exit "$failed"
