"""Step times of this library and of its peers, measured side by side. See README.md here.

python benchmarks/bench.py                           # W1-1000, W3, W2-128
python benchmarks/bench.py W1-4000-fixed --contenders kfac_np,kfac-jax --rounds 40
python benchmarks/bench.py --quick                   # does it run? tiny networks, seconds
python benchmarks/bench.py tables --help             # losses on tables of numbers, by tables.py
python benchmarks/bench.py convnet --help            # way to a loss, beside PyTorch, by convnet.py
python benchmarks/bench.py code                      # code that one step enters, by step_code.py
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import convnet, step_code, tables
from benchmarks.measure import Round, Settings
from benchmarks.registry import choose, left_out, pair
from benchmarks.report import conditions, heading, libraries, table, write_json, write_text
from benchmarks.special import SPECIAL, components, growth, growth_csv, growth_picture, startup
from benchmarks.workloads import CUDA_DEFAULT, DEFAULT, WORKLOADS, select, tiny


def main() -> int:
    """Measure, print, write."""
    if sys.argv[1:2] == ["tables"]:
        return tables.main(sys.argv[2:])
    if sys.argv[1:2] == ["convnet"]:
        return convnet.main(sys.argv[2:])
    if sys.argv[1:2] == ["code"]:
        return step_code.main(sys.argv[2:])
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the contenders are ended
    device = "cuda" if args.backend == "cupy" else "cpu"
    names = args.workloads or list(CUDA_DEFAULT if device == "cuda" else DEFAULT)
    settings = Settings(
        threads=args.threads,
        device=device,
        dtype=args.dtype,
        tf32=args.tf32,
        rounds=args.rounds or (6 if args.quick else 60),
        seconds=args.seconds,
        pythons=dict(args.python),
        options={"sizes": [256]} if args.quick else {},
    )
    record = conditions(args.threads, device, args.dtype)
    record |= {"tf32": args.tf32, "workloads": {}}
    print(heading(record))
    wanted = [n for n in args.contenders.split(",") if n]
    for name in (n for n in names if n in SPECIAL):
        record[name] = run_special(name, settings, wanted, args)
        if args.out:
            write_json(args.out, record)
    for workload in select([n for n in names if n not in SPECIAL]):
        if args.quick:
            workload = tiny(workload)
        chosen, why_not = left_out(wanted, workload, device, choose(wanted, workload))
        result = Round(workload, chosen, settings).run()
        result["failed"] |= why_not
        record["workloads"][workload.name] = result
        print(f"\n{table(workload.name, result)}\n\n{libraries(result)}", flush=True)
        if args.out:
            write_json(args.out, record)
    if args.out:
        print(f"\nwritten: {args.out}")
    nothing = record["workloads"] and not any(r["contenders"] for r in record["workloads"].values())
    return 1 if nothing else 0


def run_special(name: str, settings: Settings, wanted: list[str], args: Any) -> Any:
    """Components, growth (with a CSV file and a picture beside the JSON) or start-up."""
    if name == "components":
        found, text = components(settings, args.quick)
    elif name == "startup":
        found, text = startup(settings, wanted, args.quick)
    else:
        found, text = growth(settings, wanted, args.quick)
        if args.out:
            stem = args.out.with_suffix("")
            write_text(stem.with_name(f"{stem.name}-growth.csv"), growth_csv(found))
            try:
                growth_picture(found, stem.with_name(f"{stem.name}-growth.png"))
            except ImportError as error:
                text += f"\n\nno picture: {error}; pip install matplotlib"
    print(f"\n{text}", flush=True)
    return found


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "workloads",
        nargs="*",
        help=f"{', '.join((*WORKLOADS, *SPECIAL))}, or what several begin with",
    )
    parser.add_argument("--backend", choices=("numpy", "cupy"), default="numpy")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--tf32", action="store_true", help="let products use TF32 on a GPU")
    parser.add_argument(
        "--threads", type=int, default=cores or 1, choices=range(1, 1025), metavar="N"
    )
    parser.add_argument("--rounds", type=int, help="turns of each contender (60)")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="stop a workload's rounds after these"
    )
    parser.add_argument("--contenders", default="", help="comma-separated; all by default")
    parser.add_argument(
        "--python",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="interpreter of a contender, or of jax or torch; also KFAC_BENCH_PYTHON_JAX, _TORCH",
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks: only whether it runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(words)
    select([name for name in args.workloads if name not in SPECIAL])  # ends here if one is unknown
    if args.out is None and not args.quick:
        results = Path(__file__).parent / "results"
        args.out = results / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{args.backend}-{args.dtype}.json"
    return args


if __name__ == "__main__":
    sys.exit(main())
