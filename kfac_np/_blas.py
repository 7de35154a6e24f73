"""What has to be said before NumPy is loaded: idle threads of its BLAS are to go to sleep.

After a product OpenBLAS's threads look for more work for 2²⁶ cycles of the clock (some 25 ms) and
keep the cores from the threads of `kfac_np.backend.threads`. With 2²⁰ they still wait through what
lies between two products of a step. OpenBLAS reads the variable when it is loaded: with NumPy
imported first, nothing changes.
"""

import os
import sys

if "numpy" not in sys.modules:
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
