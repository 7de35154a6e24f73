"""The lectures in examples/ run, and say what they should; so does the example in the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import AVAILABLE

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))

# For each script its options, and lines of its output as regular expressions.
EXPECTED: dict[str, tuple[list[str], list[str]]] = {
    "00_kfac_in_one_file": (
        [],
        [
            r"K-FAC after 200 steps, +\d+\.\d s: test loss 0\.1\d\d",
            r"SGD   after 200 steps, +\d+\.\d s: test loss 0\.7\d\d",
        ],
    ),
    "01_a_layer_by_hand": (
        [],
        [
            r"1\. forward: inputs \(5, 3\), parameters \(2, 4\), outputs \(5, 2\)",
            r"3\. adjoints: ⟨u, Jv⟩ = (-?\d+\.\d{9})\d*, ⟨Jᵀu, v⟩ = \1\d*",
            r" +1000 +0\.0\d+",
        ],
    ),
    "02_the_fisher_three_ways": (
        [],
        [
            r"40 examples, 3 classes, 27 parameters: F is 27 × 27",
            r" +256 +0\.0\d+ +0\.\d+",
            r" +drawn from the model +0\.\d\d +[01]\.\d\d",
        ],
    ),
    "03_kronecker_factors_and_where_they_are_exact": (
        [],
        [
            r" +3\. deep linear network, 50 examples( +\d\.\de(-1\d|\+00)){3}",
            r" +4\. tanh and softmax, 50 examples( +\d\.\de-01){2}",
            r" +a loss at every location +\d\.\de-1\d   refused",
        ],
    ),
    "04_a_natural_gradient_step": (
        [],
        [
            r" +after 1 natural gradient step +\d\.\de-2\d",
            r" +0\.001 +\d\.\d\de-0[67] +\d\.\d\de-0[67] +(0\.99|1\.00)\d\d",
            r" +K-FAC +\d\.\de-(0[89]|1\d)   of the movement",
        ],
    ),
    "05_train_an_autoencoder": (
        ["--quick", "--plot", "digits.png"],
        [
            r"total +5478 +1\.39M +928k",
            r"K-FAC +\d\d\.\d\d +\d+\.\d\d +15 +\d\d\.\d\d +\d\d\.\d\d",
            r"wrote digits\.png",
        ],
    ),
    "06_a_convolution_is_a_dense_layer": (
        [],
        [
            r"1\. 4 images of 7×7×2: 16 patches each, ā is \(4, 16, 19\)",
            r"3\. ∂L/∂W̄ = Σ g āᵀ; differs from finite differences by \de-(0[89]|1\d)",
            r"4\. ā has 1216 numbers, x 392; the same gradient in 4 parts",
        ],
    ),
    "07_omega_and_gamma": (
        [],
        [
            r" +corner of Ω: 36 \(the number of locations\), of A: 1",
            r" +damping by pi_trace +\d\.\de-1\d",
            r" +damping by plain +\d\.\de(-01|\+00)",
        ],
    ),
    "08_three_assumptions_as_pictures": (
        ["--plot", "blocks.png"],
        [
            r"IAD +0\.0\d\d +1\.0\d +\d\.\de-01",
            r"IAD, SH, SUD +0\.[3-7]\d\d +1\.\d\d +\d\.\de-1\d",
            r"wrote blocks\.png",
        ],
    ),
    "09_expand_against_reduce": (
        [],
        [
            r"1\. a loss at every location +\d\.\de-1\d +refused",
            r"2\. mean, linear head +9\.\de-01 +\d\.\de-1\d",
            r"the border costs reduce 17\.3 %, 4\.5 %, 0\.8 %",
        ],
    ),
    "10_grouped_convolutions": (
        [],
        [
            r" +group 1, small inputs +\d\.\de-1\d +4\.\d\d",
            r" +after a step with own factors +\d\.\de-[23]\d",
            r" +after a step with averaged ones +\d\.\de\+00",
        ],
    ),
    "11_batch_statistics": (
        [],
        [
            r" +alone: layer 1: BatchNorm\(4\): expected at least two values .*",
            r"3\. vectors backpropagated: 12; with rows taken for gradients F is off by \d+%",
            r"4\. frozen: examples coupled\? True before, False after",
        ],
    ),
    "12_how_sure_is_a_network": (
        ["--plot", "bands.png"],
        [
            r"1\. at x = 10: 9\.72 ± 0\.46",
            r" +best: δ = 0\.\d+, σ = 0\.2\d+: +-2\d\.\d",
            r" +K-FAC +0\.[01]\d +0\.[5-7]\d +0\.[01]\d +1\.\d\d +-5\d\.\d",
            r"wrote bands\.png",
        ],
    ),
    "13_where_a_mistake_comes_from": (
        ["--plot", "images.png"],
        [
            r" +0 +(0\.\d{5}) +\1 +0\.0\d+",
            r" +a 1, taken for 0 +3\.\d\d +0\.\d\d +[89]\.\d\d +3\.\d\d",
            r"4\. Of the 30 images with the largest self-influence 2\d have a planted label",
            r"wrote images\.png",
        ],
    ),
    "14_which_weights_are_needed": (
        ["--plot", "pruning.png"],
        [
            r" +obs +0\.0204 +0\.0114 +0\.1177",
            r" +K-FAC +0\.9\d\d +0\.9\d\d +0\.9\d\d +0\.[89]\d\d .*",
            r"wrote pruning\.png",
        ],
    ),
    "15_one_task_after_the_other": (
        ["--plot", "tasks.png"],
        [
            r" +the second after the first, C full +\d\.\de-1[56]",
            r" +K-FAC( +0\.[789]\d){5} +0\.[78]\d\d",
            r"wrote tasks\.png",
        ],
    ),
}


def run(arguments: list[str], directory: Path) -> str:
    """Run a Python program in a directory of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "error"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert [path.stem for path in EXAMPLES] == list(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path):
    options, expected = EXPECTED[path.stem]
    if "--plot" in options:
        pytest.importorskip("matplotlib")
    lines = run([str(path), *options], tmp_path).splitlines()
    for pattern in expected:
        assert any(re.fullmatch(pattern, line) for line in lines), f"no line matches {pattern!r}"
    # A script leaves nothing behind but what it was asked for.
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert left == [option for option in options if "." in option]


def readme_blocks(language: str) -> list[str]:
    """The blocks of code in one language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


# What the tests add to the program of the README.
ON_TEST_IMAGES = """
z, _ = network.forward(state.params, backend.asarray(data.x_test))
wrong = backend.xp.argmax(z, axis=1) != backend.asarray(data.t_test)
print(f"{int(backend.xp.count_nonzero(wrong))} of {len(data.t_test)} wrong")
"""


def run_readme(program: str, name: str, directory: Path) -> tuple[float, int]:
    """Run the program in a process of its own, as a newcomer would: the loss, and what is wrong."""
    script = directory / "readme.py"
    program = program.replace('"numpy"', f'"{name}"') + ON_TEST_IMAGES
    script.write_text(program, encoding="utf-8")
    printed = run([str(script)], directory)
    found = re.fullmatch(r"training loss (\S+) after \d+ steps\n(\d+) of 297 wrong\n", printed)
    assert found is not None, printed
    return float(found[1]), int(found[2])


@pytest.mark.parametrize("name", AVAILABLE)
def test_readme(name: str, tmp_path: Path):
    # On each backend by changing one name.
    program, line, _ = readme_blocks("python")
    assert program.count('get_backend("numpy")') == 1
    assert line.strip() == 'backend = get_backend("cupy")'
    assert len([line for line in program.splitlines() if line]) == 10
    loss, wrong = run_readme(program, name, tmp_path)
    assert loss < 0.1
    assert wrong < 45


def test_readme_with_convolutions(tmp_path: Path):
    # The same program, fewer steps, with the other network in place of the first.
    program, _, network = readme_blocks("python")
    assert len([line for line in network.splitlines() if line]) <= 5
    (old,) = re.findall(r"^network = .*\n", program, re.M)
    program = program.replace(old, network).replace("range(60)", "range(20)")
    loss, wrong = run_readme(program, "numpy", tmp_path)
    assert loss < 0.3
    assert wrong < 45
