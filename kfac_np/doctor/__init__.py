"""The doctor: how fast this machine computes, measured in fresh processes, and what to change.

`examine` makes the report, `written` its text; ``kfac-np doctor`` prints them. A program may look
at itself with `measure` and `thread_pools`.
"""

from __future__ import annotations

from kfac_np.doctor.hardware import measure, thread_pools
from kfac_np.doctor.report import examine, written

__all__ = ["examine", "measure", "thread_pools", "written"]
