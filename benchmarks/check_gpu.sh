#!/usr/bin/env bash
# Checks and times everything on a CUDA machine in one call: the whole test suite with CuPy among
# its backends, then step times on the GPU (float32, TF32) and on the CPU, beside the peers that
# are installed. Each phase ends within ten minutes.
#
#     benchmarks/check_gpu.sh [DIRECTORY FOR RESULTS] [PHASE ...]     (tests cuda tf32 components cpu)
#
# Peers in other environments: KFAC_BENCH_PYTHON_JAX=..., KFAC_BENCH_PYTHON_TORCH=...
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
shift || true
phases=${*:-tests cuda tf32 components cpu}
python -c 'import cupy; print("CuPy", cupy.__version__, cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())' || exit 1
if python -c 'import xdist' 2> /dev/null; then jobs=(--numprocesses 8); else jobs=(); fi

limit=(timeout --kill-after=20 580)

# The GPU workloads where a step is long enough to be worth it, and the peers to be ahead of.
workloads=(W1-1000 W1-4000 W1-4096 W2-512 W3)
contenders=kfac_np,kfac_np-sgd,kfac-jax,jax-sgd,torch-sgd,kfac-pytorch
bench=("${limit[@]}" python benchmarks/bench.py --seconds 15 --contenders "$contenders")

phase() {
    local day
    day=$(date +%F)
    case $1 in
        tests) "${limit[@]}" python -m pytest -q -p no:cacheprovider "${jobs[@]}" ;;
        cuda) "${bench[@]}" --backend cupy "${workloads[@]}" --out "$results/$day-cupy-float32.json" ;;
        tf32) "${bench[@]}" --backend cupy --tf32 "${workloads[@]}" --out "$results/$day-cupy-tf32.json" ;;
        components) "${bench[@]}" --backend cupy components --out "$results/$day-cupy-components.json" ;;
        cpu) "${bench[@]}" W1-1000-fixed --out "$results/$day-numpy-float32.json" ;;
        *)
            echo "no phase $1" >&2
            return 2
            ;;
    esac
}

status=0
for name in $phases; do
    echo "== $name"
    began=$SECONDS
    phase "$name" || { status=1 && echo "== $name failed, or took too long" >&2; }
    echo "== $name: $((SECONDS - began)) s"
done
exit "$status"
