"""Floor 0: array namespaces, random numbers, linear algebra and kernels.

The only place that may name NumPy-only, SciPy, CuPy or PyTorch calls. Everything above it
uses the Array API standard through the namespace of the arrays it is given.
"""

from kfac_np.backend.array import Array, Backend, array_namespace, get_backend, to_numpy
from kfac_np.backend.checks import (
    all_finite,
    require_array,
    require_finite,
    require_float,
    require_indices,
    require_same_place,
)
from kfac_np.backend.cupy_kernels.precision import tf32
from kfac_np.backend.cupy_kernels.transfer import Later, later, prefetch
from kfac_np.backend.fused import (
    clip,
    combine,
    factor_of,
    leaky_vjp,
    logistic,
    logistic_vjp,
    rectify,
    sigmoid_cross_entropy,
    softplus,
    tanh_vjp,
)
from kfac_np.backend.geometry import Geometry, pad
from kfac_np.backend.kernels import append_ones, second_moment, sum_by_index
from kfac_np.backend.linalg import (
    eigh,
    eigh_many,
    resolved_eigh,
    rounding_error,
    spd_inverse,
    spectral_norm,
    symmetrize,
)
from kfac_np.backend.patches import Patches, patch_budget, transposed_product
from kfac_np.backend.quiet import quiet, quiet_methods
from kfac_np.backend.random import Rng
from kfac_np.backend.reductions import are_finite, inner, sum_of_squares
from kfac_np.backend.rounding import above_rounding, sums_above_rounding
from kfac_np.backend.scalars import (
    DeferredChecks,
    Scalar,
    is_asynchronous,
    on_host,
    scalar,
    select,
)
from kfac_np.backend.special import erf, logsumexp, softmax
from kfac_np.backend.unfolding import fold, unfold

__all__ = [
    "Array",
    "Backend",
    "DeferredChecks",
    "Geometry",
    "Later",
    "Patches",
    "Rng",
    "Scalar",
    "above_rounding",
    "all_finite",
    "append_ones",
    "are_finite",
    "array_namespace",
    "clip",
    "combine",
    "eigh",
    "eigh_many",
    "erf",
    "factor_of",
    "fold",
    "get_backend",
    "inner",
    "is_asynchronous",
    "later",
    "leaky_vjp",
    "logistic",
    "logistic_vjp",
    "logsumexp",
    "on_host",
    "pad",
    "patch_budget",
    "prefetch",
    "quiet",
    "quiet_methods",
    "rectify",
    "require_array",
    "require_finite",
    "require_float",
    "require_indices",
    "require_same_place",
    "resolved_eigh",
    "rounding_error",
    "scalar",
    "second_moment",
    "select",
    "sigmoid_cross_entropy",
    "softmax",
    "softplus",
    "spd_inverse",
    "spectral_norm",
    "sum_by_index",
    "sum_of_squares",
    "sums_above_rounding",
    "symmetrize",
    "tanh_vjp",
    "tf32",
    "to_numpy",
    "transposed_product",
    "unfold",
]
