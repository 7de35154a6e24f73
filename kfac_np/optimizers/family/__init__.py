"""The family: methods beside K-FAC, a preconditioner each, and one optimiser around all of them.

What sees the gradient alone (Muon, Shampoo, SOAP, Adam, Lion) and what also sees the pair (ā, g)
(Eva, FOOF, SINGD) turn the gradient of one parameter into a direction: `Preconditioner`. Momentum,
weight decay, grafting, clipping and the rest are `Preconditioned`'s. `GramDescent` looks at all
parameters together, and is an optimiser of its own.
"""

from kfac_np.optimizers.family.base import Observation, Preconditioner
from kfac_np.optimizers.family.elementwise import (
    AdamScaling,
    FirstMoment,
    NAdamScaling,
    SignMomentum,
)
from kfac_np.optimizers.family.eva import Eva
from kfac_np.optimizers.family.foof import FOOF
from kfac_np.optimizers.family.gram import GramDescent, natural_direction, spring_direction
from kfac_np.optimizers.family.muon import Muon
from kfac_np.optimizers.family.preconditioned import Preconditioned
from kfac_np.optimizers.family.presets import METHODS
from kfac_np.optimizers.family.shampoo import Shampoo
from kfac_np.optimizers.family.singd import SINGD
from kfac_np.optimizers.family.soap import SOAP

__all__ = [
    "FOOF",
    "METHODS",
    "SINGD",
    "SOAP",
    "AdamScaling",
    "Eva",
    "FirstMoment",
    "GramDescent",
    "Muon",
    "NAdamScaling",
    "Observation",
    "Preconditioned",
    "Preconditioner",
    "Shampoo",
    "SignMomentum",
    "natural_direction",
    "spring_direction",
]
