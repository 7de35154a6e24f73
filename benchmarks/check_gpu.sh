#!/usr/bin/env bash
# Checks and times everything on a CUDA machine in one call: the whole test suite with CuPy among
# its backends, then the steps' times on the GPU and on the CPU.
#
#     benchmarks/check_gpu.sh [DIRECTORY FOR RESULTS]
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
python -c 'import cupy; print("CuPy", cupy.__version__, cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())'
python -m pytest -q -p no:cacheprovider
for dtype in float32 float64; do
    python benchmarks/step_time.py --backend cupy --dtype "$dtype" \
        --out "$results/$(date +%F)-cupy-$dtype.json"
done
python benchmarks/step_time.py --backend numpy --out "$results/$(date +%F)-numpy-float32.json"
