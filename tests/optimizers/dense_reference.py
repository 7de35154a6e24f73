"""K-FAC written out densely, from its paper, with nothing of the library.

Martens & Grosse 2015 (arXiv:1503.05671), algorithm 2, for the networks of `dense_net`, so
small that every matrix can be formed: the exact Fisher matrix from Jacobians by HIPS autograd,
Kronecker products of the damped factors inverted as whole matrices. The published constants stand
here as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import grad
from dense_net import LOSSES, HostArray, Net

Sampler = Callable[[HostArray, int], HostArray]
"""(outputs, step) -> targets drawn from the model's own distribution."""


class KroneckerFactored:
    """Blocks Ā ⊗ G from sampled targets (§3); damped as in §6.3, and inverted whole."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def moments(
        self, theta: HostArray, x: HostArray, targets: HostArray, w: HostArray
    ) -> list[HostArray]:
        """[A, G] for each layer, stacked in one list."""
        net = self.net
        _, inputs = net.forward(theta, x)
        zero = [np.zeros((*a.shape[:2], n)) for a, (n, _) in zip(inputs, net.shapes, strict=True)]
        derivatives = grad(
            lambda nudges: anp.sum(LOSSES[net.loss](net.forward(theta, x, nudges)[0], targets))
        )(zero)
        locations = inputs[0].shape[1]
        out = []
        for a, g in zip(inputs, derivatives, strict=True):
            out.append(np.einsum("n,nti,ntj->ij", w, a, a) / (w.sum() * locations))
            out.append(np.einsum("n,nti,ntj->ij", w, g, g) / (len(x) * locations))
        return out

    def matrix(self, moments: list[HostArray], gamma: float = 0.0) -> HostArray:
        """The whole block-diagonal matrix, rows of W one after the other."""
        F = np.zeros((self.net.num_parameters,) * 2)
        start = 0
        for A, G in zip(moments[::2], moments[1::2], strict=True):
            pi = math.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
            block = np.kron(
                G + gamma / pi * np.eye(len(G)),
                A + pi * gamma * np.eye(len(A)),
            )
            end = start + len(block)
            F[start:end, start:end] = block
            start = end
        return F

    def inverse(self, moments: list[HostArray], gamma: float) -> HostArray:
        return np.linalg.inv(self.matrix(moments, gamma))


class ExactlyDamped(KroneckerFactored):
    """The same blocks, with γ² I added to the Kronecker products themselves."""

    def inverse(self, moments: list[HostArray], gamma: float) -> HostArray:
        return np.linalg.inv(self.matrix(moments) + gamma**2 * np.eye(self.net.num_parameters))


class Whole(KroneckerFactored):
    """No approximation but sampling: the Fisher matrix from gradients of single examples."""

    def moments(
        self, theta: HostArray, x: HostArray, targets: HostArray, w: HostArray
    ) -> list[HostArray]:
        z, _ = self.net.forward(theta, x)
        g = self.net.output_gradient(z, targets)
        u = np.einsum("nc,ncp->np", g, self.net.jacobians(theta, x))
        return [np.einsum("n,np,nq->pq", w, u, u) / len(x)]

    def inverse(self, moments: list[HostArray], gamma: float) -> HostArray:
        return np.linalg.inv(moments[0] + gamma**2 * np.eye(len(moments[0])))


# ------------------------------------------------------------------------------ the optimiser


def typical_eigenvalue(matrix: HostArray, sizes: list[int]) -> float:
    """Geometric mean of the blocks' mean eigenvalues, each as often as it has parameters."""
    parts = np.split(np.diagonal(matrix), np.cumsum(sizes)[:-1])
    return float(np.exp(np.average(np.log([np.mean(part) for part in parts]), weights=sizes)))


@dataclass
class Record:
    """What one step did; `damping` and `gamma` as used in it, `next_*` as handed on."""

    theta: HostArray
    average: HostArray
    loss: float
    objective: float
    damping: float
    next_damping: float
    gamma: float
    alpha: float | None
    mu: float | None
    model_decrease: float | None
    rho: float | None
    refreshed: bool
    batch_size: int
    events: tuple[str, ...] = ()


@dataclass
class Minimum:
    """What minimises the quadratic model along a proposal and, if there is one, the last update."""

    delta: HostArray
    alpha: float
    mu: float
    decrease: float

    def times(self, part: float, bend: HostArray, slope: HostArray) -> Minimum:
        """A part of it."""
        delta = part * self.delta
        decrease = float(0.5 * delta @ bend @ delta + slope @ delta)
        return Minimum(delta, part * self.alpha, part * self.mu, decrease)


def minimised(
    bend: HostArray, slope: HostArray, proposal: HostArray, previous: HostArray | None
) -> Minimum:
    """§7."""
    V = np.stack([proposal] if previous is None else [proposal, previous], axis=1)
    coefficients = np.linalg.solve(V.T @ bend @ V, -V.T @ slope)
    delta = V @ coefficients
    decrease = float(0.5 * delta @ bend @ delta + slope @ delta)
    mu = 0.0 if previous is None else float(coefficients[1])
    return Minimum(delta, float(coefficients[0]), mu, decrease)


def shortened(found: Minimum, bend: HostArray, slope: HostArray, room: float) -> Minimum:
    """Until the model promises no more than there is: no loss here can be less than 0."""
    if -found.decrease <= room:
        return found
    delta = found.delta
    roots = np.roots([0.5 * delta @ bend @ delta, slope @ delta, room])
    s = min(float(root.real) for root in roots)
    return Minimum(s * delta, s * found.alpha, s * found.mu, -room)


class Published:
    """Algorithm 2 with the constants of §§5-8 and §13."""

    def __init__(
        self,
        net: Net,
        theta: HostArray,
        sampler: Sampler,
        lambda0: float = 150.0,
        approximation: type[KroneckerFactored] = KroneckerFactored,
        eta: float = 1e-5,
        tau1: float = 1 / 8,
        tau2: float = 1 / 4,
    ) -> None:
        self.net, self.sampler = net, sampler
        self.approximation = approximation(net)
        self.eta, self.tau1, self.tau2 = eta, tau1, tau2
        self.theta, self.average = theta, theta
        self.damping, self.gamma = lambda0, math.sqrt(lambda0 + eta)
        self.bounds = 0.0, math.inf  # the paper has none
        self.power: float | None = None  # nor a first phase of the average
        self.promises_bounded = False  # nor a bound on what the model may promise
        self.renewals = 0
        self.moments: list[HostArray] = []
        self.inverse: HostArray | None = None
        self.delta0: HostArray | None = None
        self.k = 0

    def h(self, theta: HostArray, x: HostArray, t: HostArray, w: HostArray) -> float:
        """Loss plus the ℓ2 term."""
        return float(self.net.value(theta, x, t, w)) + 0.5 * self.eta * float(theta @ theta)

    def averaged(self, theta: HostArray) -> HostArray:
        """θ̄ after this step: ξ = 0.99 of the old, or a mean of all as long as they are few."""
        xi, p = 0.99, self.power
        if p is not None:
            xi = min(1 - (p + 1) / (self.k + p), xi)
        return xi * self.average + (1 - xi) * theta

    def gradient_h(self, x: HostArray, t: HostArray, w: HostArray) -> HostArray:
        return grad(self.net.value)(self.theta, x, t, w) + self.eta * self.theta

    def update_moments(self, x: HostArray, w: HostArray) -> None:
        """§5: targets sampled on the τ₁ part; the k-th time ε = min(1 - 1/k, 0.95)."""
        n1 = math.ceil(self.tau1 * len(x))
        z, _ = self.net.forward(self.theta, x[:n1])
        new = self.approximation.moments(self.theta, x[:n1], self.sampler(z, self.k), w[:n1])
        self.renewals += 1
        epsilon = min(1.0 - 1.0 / self.renewals, 0.95)
        old = self.moments or [np.zeros_like(m) for m in new]
        self.moments = [epsilon * m + (1.0 - epsilon) * n for m, n in zip(old, new, strict=True)]

    def adapted_damping(self, rho: float) -> float:
        """§6.5: times ω₁ = (19/20)^5 where ρ is good, over it where ρ is bad."""
        exponent = 5 if rho > 3 / 4 else -5 if rho < 1 / 4 else 0
        return float(self.damping * (19 / 20) ** exponent)

    def fisher_of_model(self, x: HostArray, t: HostArray, w: HostArray) -> HostArray:
        """F on the τ₂ part plus (λ + η) I."""
        n2 = math.ceil(self.tau2 * len(x))
        F = self.net.fisher(self.theta, x[:n2], t[:n2], w[:n2])
        return F + (self.damping + self.eta) * np.eye(len(F))

    def candidates(self) -> list[float]:
        """§6.6: three values of γ every T₂ = 20 steps."""
        if self.k % 20:
            return [self.gamma]
        omega2, (low, high) = math.sqrt(19 / 20) ** 20, self.bounds
        return [self.gamma, max(omega2 * self.gamma, low), min(self.gamma / omega2, high)]

    def step(self, x: HostArray, t: HostArray, w: HostArray | None = None) -> Record:
        self.k += 1
        k = self.k
        w = np.ones(len(x)) if w is None else w
        slope = self.gradient_h(x, t, w)
        self.update_moments(x, w)
        bend = self.fisher_of_model(x, t, w)
        before = self.h(self.theta, x, t, w)

        trials = self.candidates()
        refreshed = k <= 3 or k % 20 == 0  # T₃
        best: Any = None
        for gamma in trials:
            inverse = self.inverse
            if refreshed:
                inverse = self.approximation.inverse(self.moments, gamma)
            found = minimised(bend, slope, -inverse @ slope, self.delta0)
            if self.promises_bounded:
                found = shortened(found, bend, slope, before)
            if best is None or found.decrease < best[-1].decrease:
                best = gamma, inverse, found
        gamma, inverse, found = best

        # §6.5: λ every T₁ = 5 steps.
        rho, next_damping = None, self.damping
        if k % 5 == 0:
            rho = (self.h(self.theta + found.delta, x, t, w) - before) / found.decrease
            next_damping = self.adapted_damping(rho)
        record = Record(
            theta=self.theta + found.delta,
            average=self.averaged(self.theta + found.delta),
            loss=float(self.net.value(self.theta, x, t, w)),
            objective=before,
            damping=self.damping,
            next_damping=next_damping,
            gamma=gamma,
            alpha=found.alpha,
            mu=found.mu,
            model_decrease=found.decrease,
            rho=rho,
            refreshed=refreshed,
            batch_size=len(x),
        )
        self.theta, self.average = record.theta, record.average
        self.damping, self.gamma = next_damping, gamma
        self.inverse, self.delta0 = inverse, found.delta
        return record


class Practical(Published):
    """Given rates and momentum, KL clip; λ given or adapted, γ = √(λ + η) at every refresh."""

    def __init__(
        self,
        net: Net,
        theta: HostArray,
        sampler: Sampler,
        rate: Callable[[int], float],
        momentum: Callable[[int], float],
        clip: float | None,
        damping: Callable[[int], float] | float,
        eta: float = 1e-5,
        refresh: tuple[int, int] = (10, 1),
        statistics: tuple[int, int] = (1, 3),
    ) -> None:
        start = damping if isinstance(damping, float) else damping(1)
        super().__init__(net, theta, sampler, start, eta=eta, tau1=1.0, tau2=1.0)
        self.rate, self.momentum, self.clip, self.given = rate, momentum, clip, damping
        self.refresh, self.statistics = refresh, statistics
        self.power = 19.0

    def step(self, x: HostArray, t: HostArray, w: HostArray | None = None) -> Record:
        self.k += 1
        k = self.k
        w = np.ones(len(x)) if w is None else w
        adapts = isinstance(self.given, float)  # a number is where Levenberg-Marquardt starts
        if not adapts:
            self.damping = self.given(k)
        slope = self.gradient_h(x, t, w)
        interval, first = self.statistics
        if k <= first or k % interval == 0:
            self.update_moments(x, w)
        interval, first = self.refresh
        refreshed = k <= first or k % interval == 0
        if refreshed:
            self.gamma = math.sqrt(self.damping + self.eta)
            self.inverse = self.approximation.inverse(self.moments, self.gamma)
        direction = -self.inverse @ slope

        alpha = self.rate(k)
        if self.clip is not None:
            size = alpha**2 * direction @ self.approximation.matrix(self.moments) @ direction
            alpha *= min(1.0, math.sqrt(self.clip / size))
        mu = self.momentum(k) if self.delta0 is not None else 0.0
        delta = alpha * direction
        if self.delta0 is not None:
            delta = delta + mu * self.delta0

        rho, decrease, next_damping = None, None, self.damping
        before = self.h(self.theta, x, t, w)
        if adapts and k % 5 == 0:
            bend = self.fisher_of_model(x, t, w)
            decrease = float(0.5 * delta @ bend @ delta + slope @ delta)
            rho = (self.h(self.theta + delta, x, t, w) - before) / decrease
            next_damping = self.adapted_damping(rho)
        record = Record(
            theta=self.theta + delta,
            average=self.averaged(self.theta + delta),
            loss=float(self.net.value(self.theta, x, t, w)),
            objective=before,
            damping=self.damping,
            next_damping=next_damping,
            gamma=self.gamma,
            alpha=float(alpha),
            mu=mu,
            model_decrease=decrease,
            rho=rho,
            refreshed=refreshed,
            batch_size=len(x),
        )
        self.theta, self.average = record.theta, record.average
        self.damping, self.delta0 = next_damping, delta
        return record


def growing_batch_size(k: int, first: int, n: int, full_at: int) -> int:
    """§13: m_k = min(m₁ exp((k - 1) / b), |S|) with b such that m at `full_at` is |S|, rounded."""
    b = (full_at - 1) / math.log(n / first)
    return min(round(first * math.exp((k - 1) / b)), n)
