"""Every command that is printed somewhere is one: its program, options, settings and files exist.

Nothing is trained or installed: kfac-np prints the configuration, benchmarks read their command
lines, make says what it would do. What make would do is read in the same way.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

from kfac_np.cli import main
from kfac_np.errors import ConfigError
from kfac_np.figures import figures

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
PROGRAMS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])
SOURCES = [page for page in [*PAGES, *PROGRAMS] if page.exists()]

_BEGINS = r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:kfac-np|make|python|pip)(?= |$)"


def commands(page: Path) -> list[tuple[int, str]]:
    """Line and text of the commands in blocks (by indentation or fences) and in `spans`."""
    text = page.read_text(encoding="utf-8")
    block = r"^( {4}|)(" + _BEGINS + r"(?:[^\n]*\\\n)*[^\n]*)$"
    found = [
        (m.start(), m[2].replace("\\\n", " "))
        for m in re.finditer(block, text, re.M)
        if m[1] or len(re.findall(r"^```", text[: m.start()], re.M)) % 2 == 1
    ]
    if page.suffix == ".md":
        spans = re.finditer(r"`(" + _BEGINS + r" [^`\n]+)`", text)
        found += [(m.start(), m[1]) for m in spans]
    return [(text[:start].count("\n") + 1, command) for start, command in found]


COMMANDS = [
    pytest.param(text, id=f"{page.relative_to(ROOT)}:{line}")
    for page in SOURCES
    for line, text in commands(page)
]


AFTER_A_RUN = ("fit", "influence", "prune", "uncertainty")


def check(command: str) -> None:
    """Raise what is wrong with a command: a mistake is an assertion, or the program's own error."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    {"kfac-np": kfac_np, "make": make, "python": python, "pip": pip}[program](words)


def kfac_np(words: list[str]) -> None:
    """Settings are read and printed; what has none is parsed, and its names looked up."""
    name, *rest = words
    if not rest or name == "doctor":
        words = [*words, "--help"]
    elif name == "figures":
        names = [word for word in rest if not word.startswith("-")]
        assert set(names) <= {*figures(), "all"}
        words = [*words, "--help"]
    elif "--resume" in rest or name in AFTER_A_RUN:  # the run is not there
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        return
    elif "--help" not in rest:
        words = [*words, "--print-config"]
    try:
        code = main([*words, "--debug"])
    except SystemExit as end:
        code = end.code
    assert code == 0


def make(words: list[str]) -> None:
    """Targets and variables exist, and the lines that make would run are commands, too."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        variable, sign, _ = word.partition("=")
        known = rf"^{variable} \?=" if sign else rf"^{re.escape(word)}:"
        assert variable in ("BENCH", "BENCH_FLAGS") or re.search(known, makefile, re.M), word
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if re.match(r"\.venv/bin/(kfac-np|python benchmarks/)", line):
            check(line)


def python(words: list[str]) -> None:
    """A benchmark reads its command line; a module, a script or a test file exists."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
        named = [word for word in words[2:] if "/" in word]
    elif words[0] == "benchmarks/bench.py" and words[1:2] in (["tables"], ["code"], ["convnet"]):
        program = {"tables": "tables.py", "code": "step_code.py", "convnet": "convnet.py"}[words[1]]
        python([f"benchmarks/{program}", *words[2:]])
        named = []
    elif words[0].startswith("benchmarks/"):
        arguments(words[0])(words[1:])
        named = []
    else:
        named = words[:1]
    for name in named:
        assert (ROOT / name.partition("::")[0]).exists(), name


@functools.cache
def arguments(path: str) -> Any:
    """The function of a benchmark that reads its command line, found as when it is run."""
    folder = str((ROOT / path).parent)
    with pytest.MonkeyPatch.context() as patched:
        elsewhere = [p for p in sys.path if p and Path(p).resolve() != ROOT]
        patched.setattr(sys, "path", [folder, *elsewhere])
        for name in [n for n in sys.modules if n.partition(".")[0] == "benchmarks"]:
            patched.delitem(sys.modules, name)
        return runpy.run_path(str(ROOT / path))["arguments"]


def pip(words: list[str]) -> None:
    """What is installed is this directory, with extras that exist, or something known to it."""
    assert words[0] == "install"
    for word in words[1:]:
        own = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        if own:
            assert set((own[1] or "").split(",")) <= {"", *extras()}, word
        elif word != "-e":
            assert distribution(word) in distributions(), word


def extras() -> dict[str, str]:
    """Name -> requirements."""
    metadata = ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    return dict(metadata["options.extras_require"])


def distributions() -> set[str]:
    """What extras and dependency groups install."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = [word for group in groups["dependency-groups"].values() for word in group]
    named += "\n".join(extras().values()).split("\n")
    return {"numpy", *(distribution(word) for word in named if isinstance(word, str) and word)}


def distribution(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement.strip())[0].lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_printed_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "make" in command.split() and shutil.which("make") is None:
        pytest.skip("there is no make")
    monkeypatch.setenv("COLUMNS", "80")
    check(command)


def test_messages_advise_what_can_be_installed() -> None:
    """There is no distribution of that name on the index: an extra of kfac_np is found nowhere."""
    advised = {}
    for path in sorted((ROOT / "kfac_np").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r"pip install(?: --[\w-]+)* (?:'(\w[^']+)'|(\w[\w.-]+))", text):
            advised[distribution("".join(found))] = path.name
    assert len(advised) >= 4
    assert set(advised) <= distributions(), advised


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("kfac-np train --stps 3", ConfigError),
        ("kfac-np train --data digits --set optimizer.dampng.initial=3", ConfigError),
        ("kfac-np figures fischer", AssertionError),
        ("make demmo", AssertionError),
        ("make bench BENCH=W9", SystemExit),
        ("python benchmarks/race.py 'kfac={MODEL}'", SystemExit),
        ("""python benchmarks/race.py 'kfac={"optimizer": {"rate": 3}}'""", SystemExit),
        ("python benchmarks/race_kfac_jax.py --dampings 1", SystemExit),
        ("python benchmarks/sweep.py 3", SystemExit),
        ("python benchmarks/products.py W2-128", SystemExit),
        ("python benchmarks/nothing.py", FileNotFoundError),
        ("python -m pytest tests/nothing.py", AssertionError),
        ("pip install 'kfac_np[cli]'", AssertionError),
        ("pip install '.[all]'", AssertionError),
    ],
)
def test_the_walk_sees_what_is_wrong(wrong: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        check(wrong)
