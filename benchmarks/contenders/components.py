"""The parts of this library's step, each on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.contenders.child import Running, Setup, Unsupported, serve, timed
from benchmarks.contenders.kfac_np import start
from benchmarks.workloads import Workload

Part = tuple[str, float | None, Callable[[], Any], Callable[[Any], Any]]
"""Name, operations, what is prepared, what is timed."""


def parts(setup: Setup) -> tuple[list[Part], Callable[[], None]]:
    """What is timed, and how to wait for it."""
    from kfac_np import BlockDiagonal, KFACBlock, MonteCarlo, Rng, trees
    from kfac_np.backend import to_numpy
    from kfac_np.products import quadratic_forms

    w = setup.workload
    objective, params, x, t = start(setup)
    counts = w.operations()
    model = Workload(w.name, w.network, w.batch, "exact").operations()["model"]
    curvature, fisher = BlockDiagonal(KFACBlock()), MonteCarlo(1)

    def evaluation() -> Any:
        return objective.evaluate(params, x, t)

    def statistics() -> Any:
        e = evaluation()
        return e, e.backward(e.output_gradient())

    def vectors() -> Any:
        e = evaluation()
        return e, next(iter(fisher.vectors(e, Rng(0))))

    def moments(pair: Any) -> Any:
        e, s = pair
        return [curvature.input_moments(s, e.scale), curvature.moments(s, e.scale)]

    gradient = evaluation().gradient()
    estimate = curvature.estimate(evaluation(), fisher, Rng(0))
    factors, _ = curvature.factorise(estimate, w.damping)

    def wait() -> None:
        if setup.device == "cuda":
            import cupy

            cupy.cuda.Device().synchronize()

    found: list[Part] = [
        ("forward", counts["forward"], lambda: None, lambda _: evaluation()),
        (
            "backward",
            counts["backward"],
            evaluation,
            lambda e: e.backward(e.output_gradient()),
        ),
        ("gradient", counts["gradient"], statistics, lambda p: p[0].mean_gradient(p[1])),
        ("sampling", None, evaluation, lambda e: list(fisher.vectors(e, Rng(0)))),
        ("sampled backward", counts["sampled backward"], vectors, lambda p: p[0].backward(p[1])),
        ("factor moments", counts["moments"], statistics, moments),
        (
            "inverse",
            counts["refresh"] * w.refresh,
            lambda: None,
            lambda _: curvature.factorise(estimate, w.damping),
        ),
        (
            "solve",
            counts["solve"],
            lambda: None,
            lambda _: trees.leaves(curvature.solve(factors, gradient)),
        ),
        (
            "Fisher quadratic form",
            model,
            evaluation,
            lambda e: to_numpy(quadratic_forms(e, [gradient, params])),
        ),
    ]
    return found + _of_images(objective, x), wait


def _of_images(objective: Any, x: Any) -> list[Part]:
    """Unfolding and pooling, summed over the layers that do it."""
    from kfac_np.backend import Backend, Rng, pad, unfold
    from kfac_np.layers import Conv, MaxPool

    network = objective.network
    if not any(isinstance(layer, Conv) for layer in network.layers):
        return []
    unfolded, pooled = [], []
    shape = x.shape[1:]
    for layer in network.layers:
        if isinstance(layer, Conv | MaxPool):
            images = Rng(0).normal((x.shape[0], *shape), Backend.of(x))
        if isinstance(layer, Conv):
            geometry = layer.geometry(shape[:-1])
            unfolded.append((pad(images, geometry.padding), geometry.unpadded))
        if isinstance(layer, MaxPool):
            pooled.append((layer, images))
        shape = layer.output_shape(shape)

    def pool_back(forwarded: Any) -> Any:
        return [layer.backward((), cache, y) for layer, cache, y in forwarded]

    def forwarded() -> Any:
        found = []
        for layer, images in pooled:
            y, cache = layer.forward((), images)
            found.append((layer, cache, y))
        return found

    return [
        ("unfold", None, lambda: None, lambda _: [unfold(p, g, True) for p, g in unfolded]),
        ("pooling", None, lambda: None, lambda _: [m.forward((), p) for m, p in pooled]),
        ("pooling, backward", None, forwarded, pool_back),
    ]


def build(setup: Setup) -> Running:
    """A step is every part once."""
    found, wait = parts(setup)
    times: dict[str, list[Any]] = {}
    failed: dict[str, str] = {}

    def step() -> str:
        for name, _, prepare, run in found:
            if name in failed:
                continue
            try:
                argument = prepare()
                wait()

                def call(run: Any = run, argument: Any = argument) -> str:
                    run(argument)
                    wait()
                    return ""

                times.setdefault(name, []).append(timed(call))
            except Exception as error:  # reported with the others' times
                failed[name] = f"{type(error).__name__}: {error}"
        if len(failed) == len(found):
            raise Unsupported(f"no part ran: {failed}")
        return ""

    def result() -> dict[str, Any]:
        operations = {name: count for name, count, *_ in found}
        return {"times": times, "operations": operations, "failed": failed}

    return Running(step, None, result)


if __name__ == "__main__":
    serve({"kfac_np": "pip install -e ."}, build, "kfac_np numpy cupy-cuda12x")
