"""The default K-FAC written out densely, with nothing of the library: what it adds to its paper.

Units of the layers' own, λ from the first step's F̂, bounds for λ, the guard that takes updates
back, multipliers of the layers' proposals, and momentum only from models that deserve it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from dense_net import LOSSES, HostArray, Net
from dense_reference import (
    KroneckerFactored,
    Minimum,
    Published,
    Record,
    Sampler,
    minimised,
    shortened,
    typical_eigenvalue,
)

EPSILON = float(np.finfo(np.float64).eps)


def alike(scales: HostArray) -> bool:
    """Whether they are one quantity: within a factor of 10 of their (upper) median, as is 1."""
    median = np.sort(scales)[len(scales) // 2]
    return bool(scales.max() <= 10 * median and median <= 10)


def own_units(A: HostArray, W: HostArray) -> HostArray:
    """u_ij = s_i / a_j: root mean squares of a layer's outputs, and of its inputs."""
    cancelled = 1e-6 * (W**2 @ np.diagonal(A))
    a = np.sqrt(np.diagonal(A))
    s = np.sqrt(np.maximum(np.diagonal(W @ A @ W.T), cancelled))
    return np.asarray(s[:, None] / a)


def with_half(
    bend: HostArray, slope: HostArray, proposal: HostArray, previous: HostArray
) -> Minimum | None:
    """The best α for μ = 1/2, if that leads down."""
    rest = slope + bend @ previous / 2
    alpha = -float(rest @ proposal) / float(proposal @ bend @ proposal)
    delta = alpha * proposal + previous / 2
    decrease = float(0.5 * delta @ bend @ delta + slope @ delta)
    return Minimum(delta, alpha, 0.5, decrease) if decrease < 0.0 else None


class Defaults(Published):
    """`KFAC(objective)`: with a quadratic model that uses `model_examples` examples at least."""

    def __init__(
        self,
        net: Net,
        theta: HostArray,
        sampler: Sampler,
        model_examples: int = 256,
        balanced_from: int | None = None,
        guard: tuple[float, int] = (4.0, 50),
    ) -> None:
        super().__init__(net, theta, sampler, math.nan, eta=0.0)
        self.power = 19.0
        self.model_examples, self.balanced_from = model_examples, balanced_from
        self.errors, self.settling = guard
        self.multipliers = np.ones(net.num_parameters)
        self.units = np.ones(net.num_parameters)
        self.has_units = False  # until a layer's inputs differ by orders of magnitude
        self.gamma_ratio = 0.3
        self.noisy = True  # until the same parameters have the same loss on two batches
        self.rejected = False
        self.rejections = self.trouble = 0
        self.last: tuple[float, float, float | None] | None = None  # h, its error, h at θ + δ
        self.before = theta, theta  # θ and its average before the last update

    # ------------------------------------------------------------------------- statistics

    def block_traces(self, moments: list[HostArray]) -> list[float]:
        """Of each layer, in units."""
        F = self.units * np.diagonal(KroneckerFactored(self.net).matrix(moments)) * self.units
        return [float(part.sum()) for part in np.split(F, np.cumsum(self.sizes)[:-1])]

    @property
    def sizes(self) -> list[int]:
        return [n * m for n, m in self.net.shapes]

    def renew_moments(self, x: HostArray, w: HostArray) -> list[str]:
        """As published, on a quarter of what the model has at least; a batch counts as 30 times the
        average at most."""
        least = min(max(1, self.model_examples // 4), len(x))
        n1 = max(math.ceil(max(0.8 ** (self.k - 1), 1 / 8) * len(x)), least)
        z, _ = self.net.forward(self.theta, x[:n1])
        new = self.approximation.moments(self.theta, x[:n1], self.sampler(z, self.k), w[:n1])
        old, events = self.moments, []
        if old and self.last is not None:
            known, found = self.block_traces(old), self.block_traces(new)
            for i, (before, now) in enumerate(zip(known, found, strict=True)):
                of_loss = 10 * max(self.last[0], 0.0) / self.net.num_parameters
                most = 30 * (before + self.sizes[i] * of_loss)
                if now > most:
                    events.append("moments out of proportion")
                    for j in (2 * i, 2 * i + 1):
                        new[j] = old[j] + most / now * (new[j] - old[j])
        epsilon = min(1.0 - 1.0 / self.k, 0.95) if old else 0.0
        old = old or new
        self.moments = [epsilon * m + (1.0 - epsilon) * n for m, n in zip(old, new, strict=True)]
        return events

    def renew_units(self) -> None:
        if not self.has_units:
            if all(alike(np.sqrt(np.diagonal(A))) for A in self.moments[::2]):
                return
            self.has_units, self.damping = True, math.nan
        layers = zip(self.moments[::2], self.net.split(self.theta), strict=True)
        self.units = np.concatenate([own_units(A, W).ravel() for A, W in layers])

    def inverted(self, gamma: float) -> HostArray:
        """U (Ũ A ⊗ G Ũ damped by γ)⁻¹ U."""
        scaled, m = [], self.moments
        for A, G, u in zip(m[::2], m[1::2], self.net.split(self.units), strict=True):
            rows, columns = u[:, 0] / u[0, 0], u[0]  # their outer product is u
            scaled += [columns[:, None] * A * columns, rows[:, None] * G * rows]
        return self.units[:, None] * self.approximation.inverse(scaled, gamma) * self.units

    # ------------------------------------------------------------------------------ λ and γ

    def typical(self, h: float) -> float:
        """A typical eigenvalue of F̂, in units with ten times h for all parameters together."""
        F = self.units * np.diagonal(KroneckerFactored(self.net).matrix(self.moments)) * self.units
        return typical_eigenvalue(np.diag(F), self.sizes) + self.of_loss(h)

    def of_loss(self, h: float) -> float:
        return 10 * h / self.net.num_parameters if self.has_units else 0.0

    def adapted(self, rho: float | None, typical: float) -> float:
        """Halved where ρ > 3/4, doubled where ρ < 1/4, within bounds; down where ρ says nothing."""
        new = self.damping
        if rho is None:
            new = max(new / 2, typical) if new > typical else new
        elif rho > 3 / 4:
            new /= 2
        elif rho < 1 / 4:
            new *= 2
        new = max(new, (0.3 if self.noisy else 1e-10) * typical)
        return min(new, max(1e8 * typical, self.damping / 2))

    def candidates(self) -> list[float]:
        """γ goes with √λ; searched by a factor of 2 in step 3 and every 20th, within 10 √λ."""
        root = math.sqrt(self.damping)
        gamma = self.gamma_ratio * root
        smaller, larger = max(gamma / 2, root / 10), min(gamma * 2, root * 10)
        if self.k == 3:
            return [gamma, larger, smaller]
        return [gamma, smaller, larger] if self.k % 20 == 0 else [gamma]

    def balance(self, bend: HostArray, slope: HostArray, proposal: HostArray) -> None:
        """Multiply each layer by the root of its own best step, over that of all; mean 1."""
        ends = np.cumsum([0, *self.sizes])
        layers = [slice(a, b) for a, b in itertools.pairwise(ends)]
        descents = [-slope[s] @ proposal[s] for s in layers]
        bends = [proposal[s] @ bend[s, s] @ proposal[s] for s in layers]
        first = (self.multipliers == 1.0).all()
        for s, descent, own in zip(layers, descents, bends, strict=True):
            ratio = (descent / own) / (sum(descents) / sum(bends))
            self.multipliers[s] *= ratio if first else math.sqrt(ratio)
        self.multipliers /= np.mean([self.multipliers[s][0] for s in layers])

    # -------------------------------------------------------------------------------- steps

    def standard_error(self, x: HostArray, t: HostArray, w: HostArray) -> float:
        terms = LOSSES[self.net.loss](self.net.forward(self.theta, x)[0], t)
        means = w * terms.reshape(len(x), -1).mean(axis=1)
        return float(np.std(means, ddof=1)) / math.sqrt(len(x))

    def harmful(self, h: float, error: float) -> bool:
        """What this batch says of the last update; and whether batches differ."""
        if self.last is None:
            return False
        old, old_error, measured = self.last
        if measured is not None:
            self.noisy = abs(h - measured) > 10 * EPSILON * (h + measured)
        if self.rejected:
            return False
        return h - old * (1 + 10 * EPSILON) > (
            self.errors * math.hypot(error, old_error) if self.noisy else 0.0
        )

    def more(self) -> float:
        """What λ is multiplied by where an update is taken back, after so many in a row."""
        return 4.0 ** min(self.rejections + 1, 8)

    def undo(self, h: float, x: HostArray) -> Record:
        (self.theta, self.average), used = self.before, self.damping
        self.damping *= self.more()
        self.delta0, self.last, self.rejected = None, None, True
        return self.record(h, x, used, events=("update taken back",))

    def record(self, h: float, x: HostArray, damping: float, **known: Any) -> Record:
        nothing = {"alpha": None, "mu": None, "model_decrease": None, "rho": None}
        return Record(
            theta=self.theta,
            average=self.average,
            loss=h,
            objective=h,
            damping=damping,
            next_damping=self.damping,
            gamma=self.gamma,
            batch_size=len(x),
            **{**nothing, "refreshed": False, **known},
        )

    def best(
        self, bend: HostArray, slope: HostArray, h: float, previous: Any, refreshed: bool, few: bool
    ) -> tuple[HostArray, Minimum]:
        """The proposal that the model prefers: the first that beats the first, if that."""
        found: list[Any] = []
        for gamma in self.candidates() if refreshed else [self.gamma]:
            inverse = self.inverted(gamma) if refreshed else self.inverse
            proposal = -self.multipliers * (inverse @ slope)
            minimum = minimised(bend, slope, proposal, None if few else previous)
            if few and previous is not None:
                minimum = with_half(bend, slope, proposal, previous) or minimum
            minimum = shortened(minimum, bend, slope, h)
            if not found or minimum.decrease < found[-1].decrease:
                (self.gamma, self.inverse), stop = (gamma, inverse), bool(found)
                found = [proposal, minimum]
                if stop:
                    break
        return found[0], found[1]

    def tried(
        self, whole: Minimum, h: float, parts: Any, still: bool, model: Any, batch: Any
    ) -> tuple[Minimum, float, float]:
        """The first part of an update that lowers h, h after it; the whole if none does."""
        for part in parts:
            found = whole.times(part, *model)
            value = self.h(self.theta + found.delta, *batch)
            if value < h or (value == h and part == 1 and still):
                return found, value, part
        return whole, math.inf, 1

    def step(self, x: HostArray, t: HostArray, w: HostArray | None = None) -> Record:
        self.k += 1
        w = np.ones(len(x)) if w is None else w
        h, error = self.h(self.theta, x, t, w), self.standard_error(x, t, w)
        if self.harmful(h, error):
            return self.undo(h, x)
        self.rejections = self.rejections + 1 if self.rejected else 0
        if self.rejected:
            self.trouble = self.k - 1
        slope = self.gradient_h(x, t, w)
        events = self.renew_moments(x, w)
        searches = self.k == 3 or self.k % 20 == 0
        refreshed = self.k == 1 or self.k % 10 == 0 or searches or self.rejections > 0
        if refreshed:
            self.renew_units()
        typical = self.typical(h)
        if math.isnan(self.damping):  # in the first step, and in the first with units
            self.damping, self.gamma_ratio = typical, 0.3
        used = self.damping

        n2 = max(math.ceil(len(x) / 4), min(self.model_examples, len(x)))
        few = n2 < self.model_examples and self.noisy
        previous = None if self.noisy and 2 * n2 < self.model_examples else self.delta0
        bend = self.net.fisher(self.theta, x[:n2], t[:n2], w[:n2]) + np.diag(used / self.units**2)
        proposal, found = self.best(bend, slope, h, previous, refreshed, few)
        if refreshed:
            self.gamma_ratio = self.gamma / math.sqrt(used)
        if self.balanced_from is not None and self.k >= self.balanced_from and self.k % 5 == 0:
            self.balance(bend, slope, proposal)

        rho, value = None, None
        kept = telling = True
        if self.k - self.trouble <= self.settling or self.k % 5 == 0:
            telling = abs(found.decrease) > 10 * EPSILON * h
            parts = (1, 1 / 4, 1 / 16) if telling else (1,)
            still = not telling or used > float(((self.units * slope) ** 2).sum()) / h
            found, value, part = self.tried(found, h, parts, still, (bend, slope), (x, t, w))
            kept = value <= h
            rho = (value - h) / found.decrease if telling and kept and part == 1 else None
            if kept and part < 1:
                events.append("update shortened")
                self.damping = used / part
            else:
                self.damping = self.adapted(rho, typical)
        self.rejected = telling and not kept
        if self.rejected:
            events.append("update rejected")
            self.damping = used * self.more()
        self.last = h, error, value if kept else h
        self.before = self.theta, self.average
        self.delta0 = found.delta if kept else None
        self.theta = self.theta + found.delta if kept else self.theta
        self.average = self.averaged(self.theta)
        return self.record(
            h,
            x,
            used,
            alpha=found.alpha,
            mu=found.mu,
            model_decrease=found.decrease,
            rho=rho,
            refreshed=refreshed,
            events=tuple(events),
        )
