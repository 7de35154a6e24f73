"""The documentation is true: its code runs, its names exist, its links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kfac_np

ROOT = Path(__file__).parent.parent
ADDING = ROOT / "docs" / "adding.md"
CONVOLUTIONS = ROOT / "docs" / "convolutions.md"
RECIPES = ROOT / "docs" / "recipes.md"
OF_ADDING = sorted((ROOT / "docs" / "adding").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]


def code_blocks(page: Path) -> list[tuple[int, str]]:
    """Line and text of each block of Python."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


def run(page: Path, replacements: dict[str, str] | None = None, **names: object) -> dict[str, Any]:
    """Run the Python of a page from top to bottom, with some names; return the names it leaves."""
    module = types.ModuleType("page")
    module.__dict__.update(names)
    sys.modules["page"] = module  # dataclasses look their module up
    try:
        for line, block in code_blocks(page):
            for old, new in (replacements or {}).items():
                block = block.replace(old, new)
            # Errors name the page and its line; the annotations stay text, as in a module.
            source = "\n" * line + block.replace("from __future__ import annotations", "")
            code = compile(source, str(page), "exec", flags=annotations_as_text())
            exec(code, module.__dict__)
    finally:
        del sys.modules["page"]
    return module.__dict__


def annotations_as_text() -> int:
    import __future__

    return __future__.annotations.compiler_flag


# What each page of recipes defines and calls.
RECIPE_NAMES = {
    "block": {"TraceBlock", "check_block", "describe"},
    "damping_rule": {"pi_largest", "check_curvature"},
    "kernel": {"row_squares"},
    "layer": {"QuadraticDense", "check_layer"},
    "layer_extras": {"Jitter", "CentreBatch", "check_layer"},
    "loss": {"Binomial", "check_loss"},
    "shared_weights": {"CausalConv", "check_layer"},
    "statistics": {"Temperature", "check_layer"},
    "step_rule": {"Cautious"},
}


@pytest.mark.parametrize("page", OF_ADDING, ids=lambda page: page.stem)
def test_recipes_run(page: Path):
    assert RECIPE_NAMES[page.stem] <= set(run(page))


def test_recipes_work_together():
    assert {page.stem for page in OF_ADDING} == set(RECIPE_NAMES)
    names: dict[str, Any] = {}
    for page in OF_ADDING:
        names |= run(page)
    parts = {name: names[name] for name in re.findall(r"`(\w+)`", together())}
    assert set(parts) == {"QuadraticDense", "Binomial", "TraceBlock", "pi_largest"}
    run(ADDING, **parts)


def together() -> str:
    """What the index says in the section that has the code."""
    text = ADDING.read_text(encoding="utf-8")
    return text.partition("## All together")[2].partition("```")[0]


def test_the_page_on_convolutions_is_true():
    assert "refused" in run(CONVOLUTIONS)


def test_the_page_of_recipes_is_true():
    assert {"fit", "best", "posterior", "back"} <= set(run(RECIPES))


@pytest.mark.parametrize(
    ("right", "wrong", "law"),
    [
        ("2.0 * x * (g @ square)", "x * (g @ square)", "adjointness"),
        ("linear + 2.0 * x", "linear - 2.0 * x", "adjointness"),
        ("g[..., None, :]", "g[..., None, :] / g.shape[0]", "adjointness"),
        ("AffineStatistics(cache, g)  #", "AffineStatistics(cache, g / 6)  #", "adjointness"),
        ("cache.product(dparams.T)", "0.0 * cache.product(dparams.T)", "adjointness"),
        ("return cache.take(rows)", "return cache.take(slice(2, 4))", "take"),
        ("(params * g if", "(g if", "adjointness"),
        ("noise = rng.normal", "noise = Rng(id(rng)).normal", "random_numbers"),
        ("return True", "return False", "coupling"),
        ("return Shift(mean), x - mean", "return self, x - mean", "evaluation"),
        ("return self.trials * logistic(z) - t", "return logistic(z) - t", "gradient"),
        ("return self.trials * s", "return s", "hessian"),
        ("draws, z.dtype", "draws[1:, ...], z.dtype", "sampled_targets"),
        ("if s.num_vectors == 0", "if s.num_vectors < 0", "without_vectors"),
        ("(u.shape[1] * scale.terms)", "u.shape[1]", "means"),
        ('if not all_finite(moments["mean"])', "if previous", "degenerate"),
        ('factors["inverse"] * v', 'factors["inverse"] * v**2', "solve"),
    ],
)
def test_recipes_with_a_mistake_are_caught(right: str, wrong: str, law: str):
    (page,) = [p for p in OF_ADDING for _, block in code_blocks(p) if right in block]
    assert sum(block.count(right) for _, block in code_blocks(page)) == 1
    with pytest.raises(AssertionError, match=f"breaks the law '{law}'"):
        run(page, {right: wrong})


# ------------------------------------------------------------------------------ names in backticks


def spans(page: Path) -> list[tuple[int, str]]:
    """Line and text of each `span` of code outside of blocks."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"(?sm)^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text)
    return [(text[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(r"`([^`\n]+)`", text)]


@cache
def public_names() -> dict[str, Any]:
    """Every public name of the library without its module; modules by their full name."""
    names: dict[str, Any] = {}
    for info in pkgutil.walk_packages(kfac_np.__path__, "kfac_np."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            names[name] = getattr(module, name)
    return names


def has(owner: Any, name: str) -> bool:
    fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
    return hasattr(owner, name) or name in {field.name for field in fields}


def exists(span: str) -> bool:
    """Tell whether a dotted name or a path that begins with kfac_np is there."""
    if "/" in span:
        return (ROOT / span).exists()
    pieces = span.split(".")
    for length in range(len(pieces), 0, -1):
        try:
            owner = importlib.import_module(".".join(pieces[:length]))
        except ModuleNotFoundError:
            continue
        return leads(owner, pieces[length:])
    return False


def leads(owner: Any, pieces: list[str]) -> bool:
    for i, piece in enumerate(pieces):
        if not has(owner, piece):
            return False
        last = i == len(pieces) - 1
        owner = getattr(owner, piece, None)
        if owner is None and not last:
            return False
    return True


def name_of(span: str) -> str:
    """The span without a call's arguments."""
    return span.partition("(")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_library_exist(page: Path):
    wrong = []
    for line, span in spans(page):
        name = name_of(span)
        if re.fullmatch(r"kfac_np[\w./]*", name):
            good = exists(name)
        elif re.fullmatch(r"[A-Z]\w*(\.\w+)*", name) and name.partition(".")[0] in public_names():
            first, *rest = name.split(".")
            good = leads(public_names()[first], rest)
        else:
            continue
        if not good:
            wrong.append(f"{page.name}:{line}: {span}")
    assert not wrong, "no such thing in the library:\n" + "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_classes_with_attributes_are_known(page: Path):
    # `Nonsense.method` would pass the test above for want of a class of that name.
    unknown = [
        f"{page.name}:{line}: {span}"
        for line, span in spans(page)
        if re.fullmatch(r"[A-Z]\w*[a-z]\w*\.\w+", name_of(span))
        and span.partition(".")[0] not in public_names()
    ]
    assert not unknown, "no such class in the library:\n" + "\n".join(unknown)


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and anchor not in headings(there)):
            wrong.append(target)
    assert not wrong, f"{page.name} links to what is not there: {wrong}"


def test_the_check_of_names_sees_what_is_wrong():
    assert exists("kfac_np.statistics.AffineStatistics.a")  # a field without default
    assert exists("kfac_np.Backend.asarray")
    assert exists("kfac_np/layers/dense.py")
    assert not exists("kfac_np.layers.Sense")
    assert not exists("kfac_np.layers.Dense.forwards")
    assert not exists("kfac_np/layers/sense.py")
    assert not exists("kfac_np.nowhere.at_all")
