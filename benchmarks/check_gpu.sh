#!/usr/bin/env bash
# What a GPU is asked first, in eleven minutes at most: does CuPy do what NumPy does there, how long
# are the steps that matter, do the tests pass. Each phase has a limit of its own and writes what it
# finds as it comes: one that fails, or is cut short, costs the others nothing.
#
#     benchmarks/check_gpu.sh [--quick] [DIRECTORY FOR RESULTS] [PHASE ...]
#
#     doctor     60 s   driver, CUDA's libraries, a product and a kernel, rates of products
#     agreement  90 s   every optimiser and curvature against NumPy, in float64
#     times     210 s   W1 with 4000 examples and the 4096-wide network, beside the peers: time of a
#                       step, and its share of the rate of matrix products
#     tf32       90 s   the same with TF32, this library alone
#     tests     210 s   those of tests/cuda_on_cpu/selection.txt, as far as they get
#     more      580 s   all workloads, and the parts of a step (by name only)
#
# --quick tries the script out, on tiny networks and a few tests, also without a GPU:
#     PYTHON=tests/cuda_on_cpu/run benchmarks/check_gpu.sh --quick /tmp/results
# Peers in other environments: KFAC_BENCH_PYTHON_JAX=..., KFAC_BENCH_PYTHON_TORCH=...
set -uo pipefail
cd "$(dirname "$0")/.."
quick=() tests=@tests/cuda_on_cpu/selection.txt usual="doctor agreement times tf32 tests"
if [ "${1:-}" = --quick ]; then
    quick=(--quick) tests=tests/backend/test_kernels.py usual="agreement times tf32 tests"
    shift
fi
results=${1:-benchmarks/results/gpu-$(date +%F-%H%M)}
shift || true
wanted=${*:-$usual}
python=${PYTHON:-python}
unset PYTHON # or a `run` would call itself
export PYTHONUNBUFFERED=1
mkdir -p "$results"
status=0

phase() { # NAME LIMIT COMMAND...
    local name=$1 limit=$2 began=$SECONDS
    [[ " $wanted " == *" $name "* ]] || return
    echo "== $name: $limit s at most"
    # SIGTERM goes to all processes of a phase.
    if ! timeout --kill-after=15 "$limit" "${@:3}" 2>&1 | tee "$results/$name.txt"; then
        echo "== $name failed, or took too long"
        status=1
    fi
    echo "== $name: $((SECONDS - began)) s"
}

bench=("$python" benchmarks/bench.py --backend cupy "${quick[@]}")
wide=(W1-4000-fixed W1-4000-exact W1-4096-fixed)
jobs=()
"$python" -c 'import xdist' 2> /dev/null && jobs=(--numprocesses 8)

phase doctor 60 "$python" -m kfac_np doctor --backend cupy --seconds 4
phase agreement 90 "$python" benchmarks/gpu_agreement.py
phase times 210 "${bench[@]}" "${wide[@]}" --seconds 20 --out "$results/times.json" \
    --contenders kfac_np,kfac_np-sgd,kfac-jax,torch-sgd
phase tf32 90 "${bench[@]}" --tf32 "${wide[@]}" --seconds 10 --out "$results/tf32.json" \
    --contenders kfac_np,kfac_np-sgd
phase tests 210 "$python" -m pytest -q -k cupy -p no:cacheprovider "${jobs[@]}" "$tests"
phase more 580 "${bench[@]}" W1 W2 W3 components --seconds 15 --out "$results/more.json"
echo "results: $results"
exit "$status"
