"""Mistakes, planted one at a time: which of them do the tests that run by default find?

    .venv/bin/python tests/planted_faults.py              # all of them
    .venv/bin/python tests/planted_faults.py pi ekfac     # those with such a word in their name

Each changes some characters of the library: a sign, a transpose, N for M, γ for γ². It is put into
a copy of the working tree, and the tests of its package run as in `make test`, up to the first that
fails. Where none does, the mistake is missed, and so is a test. A mistake whose place is no longer
found is stale. Either ends the program with status 1.

The tests have to pass without any of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "layers": ("tests/layers", "tests/test_fisher.py"),
    "losses": ("tests/losses", "tests/test_fisher.py"),
    "matrices": ("tests/matrices", "tests/curvature"),
    "curvature": ("tests/curvature", "tests/optimizers"),
    "optimizers": ("tests/optimizers", "kfac_np/optimizers"),
}


@dataclass(frozen=True)
class Fault:
    """`new` in the place of `old`, which stands once in kfac_np/`package`."""

    package: str
    name: str
    old: str
    new: str


FAULTS = [
    # ------------------------------------------------------------------------------------ layers
    Fault(
        "layers",
        "dense: the bias column taken for a weight in the input derivative",
        "dx = affine.product(g, params[:, : self.d_in]) if",
        "dx = affine.product(g, params[:, -self.d_in :]) if",
    ),
    Fault(
        "layers",
        "dense: wrong sign of the input's tangent",
        "dy += affine.product(dx, params[:, : self.d_in].T)",
        "dy -= affine.product(dx, params[:, : self.d_in].T)",
    ),
    Fault(
        "layers",
        "convolution: the odd zero of same padding before instead of after",
        "(p // 2, p - p // 2)",
        "(p - p // 2, p // 2)",
    ),
    Fault(
        "layers",
        "convolution: stride ignored",
        "free = Geometry(self.kernel, stride,",
        "free = Geometry(self.kernel, (1,) * axes,",
    ),
    Fault(
        "layers",
        "convolution: dilation ignored",
        "free = Geometry(self.kernel, stride, dilation,",
        "free = Geometry(self.kernel, stride, (1,) * axes,",
    ),
    Fault(
        "layers",
        "convolution: groups see every so many channels instead of neighbours",
        "Patches(x[..., i * c : (i + 1) * c],",
        "Patches(x[..., i :: self.groups],",
    ),
    Fault(
        "layers",
        "convolution: wrong sign of a second derivative",
        "dgradient[..., : self.kernel_columns] += moved",
        "dgradient[..., : self.kernel_columns] -= moved",
    ),
    Fault(
        "layers",
        "transposed convolution: output padding forgotten",
        "(n - 1) * s + 1 + o for",
        "(n - 1) * s + 1 + 0 * o for",
    ),
    Fault(
        "layers",
        "transposed convolution: padding before and after exchanged",
        "(e - low, e - high)",
        "(e - high, e - low)",
    ),
    Fault(
        "layers",
        "average pool: one tap too many in the mean",
        "return y * (1.0 / geometry.taps)",
        "return y * (1.0 / (geometry.taps + 1))",
    ),
    Fault(
        "layers",
        "adaptive pool: the end of a bin rounded down",
        "-(-(i + 1) * n // bins)",
        "max((i + 1) * n // bins, i * n // bins + 1)",
    ),
    Fault(
        "layers",
        "attention: scaled by all heads' numbers instead of one head's",
        "return (self.d_model // self.heads) ** -0.5",
        "return self.d_model**-0.5",
    ),
    Fault(
        "layers",
        "attention: a causal position sees the next one",
        "s[None, :] <= s[:, None]",
        "s[None, :] <= s[:, None] + 1",
    ),
    Fault(
        "layers",
        "recurrent: no derivative through the state",
        "else g[..., s, :] + dz[..., -self.d_state :]",
        "else g[..., s, :] + 0.0 * dz[..., -self.d_state :]",
    ),
    Fault(
        "layers",
        "normalisation: the derivative of the variance forgotten",
        "return rate * (c - x_hat * self._mean(x_hat * c))",
        "return rate * c",
    ),
    Fault(
        "layers",
        "residual: no derivative past the branch",
        "self._sum(g if wrt_input else None, found)",
        "self._sum(None, found)",
    ),
    Fault(
        "layers",
        "dropout: divided by the rate of what is dropped",
        "(1.0 / (1.0 - self.rate))",
        "(1.0 / self.rate)",
    ),
    Fault(
        "layers",
        "recurrent: the first state on another device than the input",
        "xp.zeros((x.shape[0], self.d_state), dtype=x.dtype, device=x.device)",
        "xp.zeros((x.shape[0], self.d_state), dtype=x.dtype)",
    ),
    # ------------------------------------------------------------------------------------ losses
    Fault(
        "losses",
        "softmax: Hessian without its second term",
        "return p * (u - xp.sum(p * u, axis=-1, keepdims=True))",
        "return p * u",
    ),
    Fault(
        "losses",
        "softmax: wrong sign in the Fisher factor",
        "columns[k, ...] -= p * root",
        "columns[k, ...] += p * root",
    ),
    Fault("losses", "softmax: classes drawn in reverse", "passed <= u", "passed > u"),
    Fault(
        "losses",
        "softmax: class numbers on another device than the targets",
        "xp.arange(z.shape[-1], dtype=xp.int64, device=t.device)",
        "xp.arange(z.shape[-1], dtype=xp.int64)",
    ),
    Fault(
        "losses",
        "squared error without its half",
        "return 0.5 * xp.sum((z - t) ** 2, axis=-1)",
        "return xp.sum((z - t) ** 2, axis=-1)",
    ),
    # --------------------------------------------------------------------------------- curvature
    Fault(
        "curvature",
        "A: weights of the examples forgotten",
        "m = second_moment(rows, weights)",
        "m = second_moment(rows)",
    ),
    Fault(
        "curvature",
        "A: every chunk of examples with the weights of the first",
        "weights[first * each : first * each + rows.shape[0]]",
        "weights[: rows.shape[0]]",
    ),
    Fault(
        "curvature",
        "A of an embedding: weights on another device",
        "xp.ones(indices.shape, dtype=s.g.dtype, device=s.g.device)",
        "xp.ones(indices.shape, dtype=s.g.dtype)",
    ),
    Fault(
        "curvature",
        "G: divided by N instead of M",
        "moment *= 1.0 / scale.terms",
        "moment *= 1.0 / scale.examples",
    ),
    Fault(
        "curvature",
        "reduce: inputs added instead of averaged",
        "xp.mean(a, axis=1), xp.sum(g, axis=-2)",
        "xp.sum(a, axis=1), xp.sum(g, axis=-2)",
    ),
    Fault(
        "curvature",
        "pi inverted",
        "return pi * gamma, gamma / pi",
        "return gamma / pi, pi * gamma",
    ),
    Fault(
        "curvature",
        "pi: one root forgotten",
        "pi = xp.sqrt(xp.where(both, norm_a, one)) /",
        "pi = xp.where(both, norm_a, one) /",
    ),
    Fault(
        "curvature",
        "plain rule: gamma for its square",
        "return gamma**2, gamma**2",
        "return gamma, gamma",
    ),
    Fault(
        "curvature",
        "K-FAC: damping for its root",
        'shifts = self.rule(moments["A"], moments["G"], damping**0.5)',
        'shifts = self.rule(moments["A"], moments["G"], damping)',
    ),
    Fault(
        "curvature",
        "eigenbasis: a transpose forgotten",
        "v = xp.matrix_transpose(u_g) @ v",
        "v = u_g @ v",
    ),
    Fault(
        "curvature",
        "units of a layer: inputs multiplied instead of divided",
        "return s[..., :, None], 1.0 / x[..., None, :]",
        "return s[..., :, None], x[..., None, :]",
    ),
    Fault(
        "curvature",
        "EKFAC: S divided by N instead of M",
        "return faster(s, u_a, u_g) / scale.terms",
        "return faster(s, u_a, u_g) / (s.num_examples + 0.0)",
    ),
    Fault(
        "curvature",
        "EKFAC: S averaged as if it had an estimate more",
        "clip(age / (age + 1.0), high=epsilon)",
        "clip((age + 1.0) / (age + 2.0), high=epsilon)",
    ),
    Fault(
        "curvature",
        "EKFAC: the basis renewed an estimate too late",
        "if age + 1.0 >= interval:",
        "if age >= interval:",
    ),
    Fault(
        "curvature",
        "EKFAC: every group in the basis of the first",
        "_affine(group, u_a[i, ...], u_g[i, ...])",
        "_affine(group, u_a[0, ...], u_g[i, ...])",
    ),
    Fault(
        "curvature",
        "tridiagonal: wrong sign of what is pulled from the next layer",
        'return factors["Psi_G"].T @ v @ factors["Psi_A"]',
        'return -factors["Psi_G"].T @ v @ factors["Psi_A"]',
    ),
    Fault(
        "curvature",
        "full Kronecker: a block not transposed below the diagonal",
        "out[columns, rows] = block, block.T",
        "out[columns, rows] = block, -block.T",
    ),
    Fault(
        "curvature",
        "diagonal block: not damped",
        'ladder.reciprocal("diagonal", diagonal, damping)',
        'ladder.reciprocal("diagonal", diagonal, 0.0 * damping)',
    ),
    Fault(
        "curvature",
        "scale and shift: blocks divided by N instead of M",
        "_squares(u, u) / scale.terms",
        "_squares(u, u) / scale.examples",
    ),
    # -------------------------------------------------------------------------------- matrices
    Fault(
        "matrices",
        "Kronecker eigenbasis: a transpose forgotten",
        "return v if self.U_A is None else v @ self.U_A.T",
        "return v if self.U_A is None else v @ self.U_A",
    ),
    Fault(
        "matrices",
        "chain: blocks off the diagonal count once in the norm",
        "2.0**0.5 * (norm(a) * norm(g))",
        "norm(a) * norm(g)",
    ),
    # ------------------------------------------------------------------------------- optimisers
    Fault(
        "optimizers",
        "lambda: the floor a ceiling",
        "new = select(new > least, new, least)",
        "new = select(new < least, new, least)",
    ),
    Fault(
        "optimizers",
        "lambda: decays by one step in each interval",
        "omega = self.decay**self.interval\n        new = select(rho",
        "omega = self.decay\n        new = select(rho",
    ),
    Fault(
        "optimizers",
        "lambda: raised where the model is right",
        "select(rho > 0.75, omega * current, select(rho < 0.25, current / omega, current))",
        "select(rho > 0.75, current / omega, select(rho < 0.25, omega * current, current))",
    ),
    Fault(
        "optimizers",
        "factors damped by gamma instead of its square",
        "curvature.factorise(moments, gamma**2, state.factors)",
        "curvature.factorise(moments, gamma, state.factors)",
    ),
    Fault(
        "optimizers",
        "gamma: the search keeps the worst candidate",
        "if other.decrease < choice.decrease:",
        "if other.decrease > choice.decrease:",
    ),
    Fault(
        "optimizers",
        "momentum: the proposal kept in place of the update",
        "update=trees.select(kept, outcome.update, trees",
        "update=trees.select(kept, proposal.delta, trees",
    ),
    Fault(
        "optimizers",
        "moving average: old and new exchanged",
        "return curvature.mix(old, new, epsilon), events",
        "return curvature.mix(old, new, 1.0 - epsilon), events",
    ),
    Fault(
        "optimizers",
        "moving average: off by one estimate",
        "return min(1.0 - 1.0 / estimates, self.decay)",
        "return min(1.0 - 1.0 / (estimates + 1), self.decay)",
    ),
    Fault(
        "optimizers",
        "guard: what rises a little is kept",
        "kept = kept & (value <= h.value)",
        "kept = kept & (value <= h.value + 0.5 * abs(h.value))",
    ),
    Fault(
        "optimizers",
        "guard: standard errors added instead of their squares",
        "xp.sqrt(errors[0] * errors[0] + errors[1] * errors[1])",
        "(errors[0] + errors[1])",
    ),
    Fault(
        "optimizers",
        "model: the half of the decrease forgotten",
        "decrease = 0.5 * (alpha * c + select(",
        "decrease = 1.0 * (alpha * c + select(",
    ),
    Fault(
        "optimizers",
        "model: weight decay by lambda",
        "form + self.l2 * scalar(trees.inner(vectors[i], vectors[j]))",
        "form + self.damping * scalar(trees.inner(vectors[i], vectors[j]))",
    ),
    Fault(
        "optimizers",
        "model: wrong sign in the determinant",
        "determinant = b * b0 - cross * cross",
        "determinant = b * b0 + cross * cross",
    ),
    Fault(
        "optimizers",
        "refresh: one step fewer at first",
        "return k <= self.first or k % self.interval == 0",
        "return k < self.first or k % self.interval == 0",
    ),
    Fault(
        "optimizers",
        "KL clip: the rate for its square",
        "change = rate**2 * curvature_norm(proposal)",
        "change = rate * curvature_norm(proposal)",
    ),
    Fault(
        "optimizers",
        "SGD: Nesterov's momentum of the step before",
        "update = trees.combine(self.momentum, velocity, -rate, h.gradient)",
        "update = trees.combine(self.momentum, state.velocity, -rate, h.gradient)",
    ),
    Fault(
        "optimizers",
        "Adam: second moment unbiased for the next step",
        "1.0 - b2**k",
        "1.0 - b2 ** (k + 1)",
    ),
    Fault(
        "optimizers",
        "average of the iterates: off by one step",
        "(p + 1.0) / (k + p)",
        "(p + 1.0) / (k + p + 1.0)",
    ),
]


def place_of(fault: Fault) -> Path | None:
    """The file of the package that has `old`, once; None where there is none or there are more."""
    files = sorted((ROOT / "kfac_np" / fault.package).rglob("*.py"))
    found = [path for path in files for _ in range(path.read_text("utf-8").count(fault.old))]
    return found[0].relative_to(ROOT) if len(found) == 1 else None


def copy_of_the_tree(where: Path) -> Path:
    """The files that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, where / name)
    return where


def seen(fault: Fault, place: Path, tree: Path) -> tuple[str, float]:
    """The test that fails first with the fault ("" if none does), and after how many seconds."""
    path, start = tree / place, time.monotonic()
    good = path.read_text("utf-8")
    path.write_text(good.replace(fault.old, fault.new), "utf-8")
    # A file may change twice within the second that cached bytecode is dated by.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    try:
        run = subprocess.run(
            [*command, *TESTS[fault.package]],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(good, "utf-8")
    if run.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with status {run.returncode}:\n{run.stdout}{run.stderr}")
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", run.stdout, re.MULTILINE)
    name = found[1] if found else f"status {run.returncode}"
    return (name if run.returncode else ""), time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Which planted mistakes do the tests find?")
    parser.add_argument("words", nargs="*", help="of the names of some mistakes")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--list", action="store_true", help="say which there are, and plant none")
    given = parser.parse_args()
    faults = [f for f in FAULTS if not given.words or any(word in f.name for word in given.words)]
    places = {fault: place_of(fault) for fault in faults}
    stale = [fault for fault, place in places.items() if place is None]
    if given.list:
        for fault in faults:
            print(f"{places[fault] or 'STALE'}: {fault.name}")
        return bool(stale)
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(given.jobs):
            trees.put(copy_of_the_tree(Path(folder) / str(i)))

        def plant(fault: Fault) -> tuple[Fault, str, float]:
            tree, place = trees.get(), places[fault]
            assert place is not None
            try:
                return fault, *seen(fault, place, tree)
            finally:
                trees.put(tree)

        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            for fault, test, seconds in pool.map(plant, [f for f in faults if f not in stale]):
                print(f"{test or 'MISSED'} ({seconds:.0f} s): {fault.name}", flush=True)
                missed += [] if test else [fault]
    for fault in stale:
        print(f"STALE: {fault.name}")
    print(f"{len(faults) - len(missed) - len(stale)} of {len(faults)} found")
    return bool(missed or stale)


if __name__ == "__main__":
    sys.exit(main())
