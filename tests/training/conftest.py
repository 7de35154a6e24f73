"""Fixtures of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import experiment

from kfac_np.training.run import run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run(experiment(), directory)
    return directory
