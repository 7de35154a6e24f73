"""Methods by name: a preconditioner, and what usually goes with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kfac_np.objective import Objective
from kfac_np.optimizers.family.base import Preconditioner
from kfac_np.optimizers.family.elementwise import AdamScaling, NAdamScaling, SignMomentum
from kfac_np.optimizers.family.eva import Eva
from kfac_np.optimizers.family.foof import FOOF
from kfac_np.optimizers.family.muon import Muon
from kfac_np.optimizers.family.preconditioned import Preconditioned
from kfac_np.optimizers.family.shampoo import Shampoo
from kfac_np.optimizers.family.singd import SINGD
from kfac_np.optimizers.family.soap import SOAP

__all__ = [
    "METHODS",
    "adamw",
    "eva",
    "foof",
    "kl_shampoo",
    "lion",
    "muon",
    "nadam",
    "shampoo",
    "singd",
    "soap",
]


def adamw(objective: Objective, **changes: Any) -> Preconditioned:
    """Adam with decoupled weight decay.

    Parameters
    ----------
    objective : Objective
    **changes
        Replace fields of `Preconditioned`; so with all methods here.

    References
    ----------
    Loshchilov & Hutter 2019, arXiv:1711.05101.

    Examples
    --------
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> adamw(Objective(Dense(2, 1), SquaredError()), rate=0.01).weight_decay
    0.01
    """
    return replace(Preconditioned(objective, AdamScaling(), weight_decay=1e-2), **changes)


def nadam(objective: Objective, **changes: Any) -> Preconditioned:
    """Adam with Nesterov's momentum (`NAdamScaling`)."""
    return replace(Preconditioned(objective, NAdamScaling()), **changes)


def lion(objective: Objective, **changes: Any) -> Preconditioned:
    """The sign of a momentum (`SignMomentum`), at a rate a tenth of Adam's, with weight decay."""
    made = Preconditioned(objective, SignMomentum(), rate=1e-4, weight_decay=0.1)
    return replace(made, **changes)


def muon(objective: Objective, **changes: Any) -> Preconditioned:
    """Orthogonalised momentum (`Muon`) of all matrices, Adam for the rest, at one rate."""
    made = Preconditioned(objective, Muon(), fallback=_ADAM, weight_decay=1e-2)
    return replace(made, **changes)


def shampoo(objective: Objective, **changes: Any) -> Preconditioned:
    """`Shampoo`, with the length of Adam's direction."""
    return replace(Preconditioned(objective, Shampoo(), graft=_ADAM, fallback=_ADAM), **changes)


def kl_shampoo(objective: Objective, **changes: Any) -> Preconditioned:
    """KL-`Shampoo`, with the length of Adam's direction."""
    made = Preconditioned(objective, Shampoo(kl=True), graft=_ADAM, fallback=_ADAM)
    return replace(made, **changes)


def soap(objective: Objective, **changes: Any) -> Preconditioned:
    """Adam in Shampoo's eigenbasis (`SOAP`)."""
    return replace(Preconditioned(objective, SOAP(), fallback=_ADAM), **changes)


def eva(objective: Objective, **changes: Any) -> Preconditioned:
    """`Eva`, with momentum and the KL clip."""
    return replace(_with_momentum(objective, Eva()), **changes)


def foof(objective: Objective, **changes: Any) -> Preconditioned:
    """`FOOF`, with momentum and the KL clip."""
    return replace(_with_momentum(objective, FOOF()), **changes)


def singd(objective: Objective, **changes: Any) -> Preconditioned:
    """`SINGD`, with momentum and the KL clip."""
    return replace(_with_momentum(objective, SINGD()), **changes)


def _with_momentum(objective: Objective, rule: Preconditioner) -> Preconditioned:
    return Preconditioned(objective, rule, rate=0.1, momentum=0.9, kl_clip=1e-3)


_ADAM = AdamScaling(0.9, 0.95)

METHODS = {
    "adamw": adamw,
    "nadam": nadam,
    "lion": lion,
    "muon": muon,
    "shampoo": shampoo,
    "kl-shampoo": kl_shampoo,
    "soap": soap,
    "eva": eva,
    "foof": foof,
    "singd": singd,
}
"""Methods by the name that the command line knows them by."""
