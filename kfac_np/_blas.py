"""What has to be said while NumPy is loaded: idle threads of its BLAS are to go to sleep.

After a product OpenBLAS's threads look for more work for 2²⁶ cycles of the clock (some 25 ms) and
keep the cores from the threads of `kfac_np.backend.numpy_kernels.threads`. With 2²⁰ they still wait
through what lies between two products of a step. OpenBLAS reads the variable when it is loaded, and
not again, so that it need not stay for the processes that this one starts: with NumPy imported
first, nothing changes.
"""

import os
import sys

_NAME = "OPENBLAS_THREAD_TIMEOUT"

if "numpy" not in sys.modules and _NAME not in os.environ:
    os.environ[_NAME] = "20"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[_NAME]
