"""The scores of benchmarks/influence.py by kronfluence, in the environment that has it.

Float32, its defaults but for the damping (a tenth of the mean eigenvalue) and the batches: with
more than 100 examples at a time it takes more memory, and not less time.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn
from torch.nn.functional import cross_entropy


class Classification(Task):
    """Cross-entropy, summed."""

    def compute_train_loss(self, batch, model, sample=False):
        x, t = batch
        z = model(x)
        if sample:
            t = torch.multinomial(torch.softmax(z.detach(), -1), 1).flatten()
        return cross_entropy(z, t, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=("kfac", "ekfac"))
    parser.add_argument("--examples", type=int)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    draws = np.random.default_rng(0)
    x = draws.standard_normal((flags.examples, 30)) @ draws.standard_normal((30, 784))
    x = torch.tensor(0.3 * (x + draws.standard_normal(x.shape)), dtype=torch.float32)
    t = torch.tensor(draws.integers(0, 10, flags.examples))
    layers = nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 10)
    task = Classification()
    examples = torch.utils.data.TensorDataset(x, t)
    queries = torch.utils.data.TensorDataset(x[:100], t[:100])
    with tempfile.TemporaryDirectory() as directory:
        model = prepare_model(nn.Sequential(*layers), task)
        options = {"cpu": True, "output_dir": directory, "disable_tqdm": True}
        analyzer = Analyzer("scores", model, task, **options)
        before = time.process_time()
        factors = FactorArguments(strategy=flags.one, use_empirical_fisher=True)
        analyzer.fit_all_factors("f", examples, per_device_batch_size=100, factor_args=factors)
        between = time.process_time()
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            queries,
            examples,
            per_device_query_batch_size=100,
            per_device_train_batch_size=100,
            score_args=ScoreArguments(damping_factor=None),
        )
        after = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"fit": between - before, "scores": after - between, "MB": memory}))


if __name__ == "__main__":
    main()
