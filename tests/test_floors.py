"""The import law: a module imports strictly lower floors, and its own package.

Only the ground floor may name an array library; whatever stands above it is written in the
Array API standard and therefore runs on all of them.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import kfac_np

ROOT = Path(kfac_np.__file__).parent

FLOORS = {
    "_blas": 0,
    "backend": 0,
    "errors": 0,
    "validation": 0,
    "trees": 1,
    "matrices": 1,
    "statistics": 1,
    "layers": 2,
    "losses": 2,
    "objective": 3,
    "fisher": 3,
    "products": 3,
    "penalties": 3,
    "pytorch": 3,
    "curvature": 4,
    "optimizers": 5,
    "distributed": 5,
    "data": 5,
    "testing": 5,
    "training": 6,
    "applications": 6,
    "sklearn": 6,
    "figures": 7,
    "doctor": 7,
    "cli": 7,
    "__main__": 8,
}

# Imports on one floor, each with its reason. Keep this short: it must never close a circle.
STAIRS = {
    ("matrices", "trees"): "a block-diagonal matrix over parameters has a block a leaf",
    ("fisher", "objective"): "vectors are backpropagated through an evaluated objective",
    ("products", "objective"): "a product is taken at an evaluated objective",
    ("products", "fisher"): "there is one product for each type of Fisher",
    ("applications", "training"): "what is fitted is saved as a checkpoint",
    ("cli", "figures"): "a command draws them",
    ("cli", "doctor"): "a command prints its report; threads are chosen by its rates",
}

# Who may import what from outside; above the ground for data and files on the host.
ARRAY_LIBRARIES = {"numpy", "scipy", "cupy", "cupyx", "torch"}
ARRAY_PACKAGES = {"_blas", "backend", "data", "training", "sklearn", "figures", "doctor"}
COMMAND_LIBRARIES = {"tqdm", "matplotlib", "pooch", "tomli_w"}
COMMAND_PACKAGES = {"data", "training", "figures", "cli", "__main__"}


def modules() -> list[tuple[Path, str]]:
    """Every file below the package with the name of its part: "layers", "trees", ..."""
    files = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
    return [(path, path.relative_to(ROOT).parts[0].removesuffix(".py")) for path in files]


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from kfac_np import trees` names a part of the package only in its list
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def part_of(name: str) -> str:
    """The part of the package that a dotted name `kfac_np.PART...` belongs to."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def allowed(importer: str, imported: str) -> bool:
    return (
        imported in (importer, "errors", "validation")
        or (importer, imported) in STAIRS
        or FLOORS[imported] < FLOORS[importer]
    )


def test_every_part_has_a_floor():
    strangers = sorted({part for _, part in modules()} - set(FLOORS))
    assert not strangers, f"give these a floor in FLOORS: {strangers}"


def test_imports_go_down():
    wrong = []
    for path, importer in modules():
        for line, name in imports(path):
            if name.split(".")[0] != "kfac_np":
                continue
            imported = part_of(name)
            place = f"{path.relative_to(ROOT.parent)}:{line}: {importer}"
            if imported not in FLOORS:
                wrong.append(f"{place} imports {name}: name the part of the package instead")
            elif not allowed(importer, imported):
                wrong.append(
                    f"{place} (floor {FLOORS[importer]}) imports {imported} "
                    f"(floor {FLOORS[imported]})"
                )
    assert not wrong, "imports must go to a strictly lower floor:\n" + "\n".join(wrong)


def test_stairs_are_used_and_stay_on_one_floor():
    used = {
        (importer, part_of(name))
        for path, importer in modules()
        for _, name in imports(path)
        if name.startswith("kfac_np.")
    }
    assert set(STAIRS) <= used, f"not needed any more: {set(STAIRS) - used}"
    assert all(FLOORS[above] == FLOORS[below] for above, below in STAIRS)
    graph = {above: {b for a, b in STAIRS if a == above} for above, _ in STAIRS}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_outside_libraries_stay_where_they_belong():
    wrong = []
    for path, importer in modules():
        for line, name in imports(path):
            library = name.split(".")[0]
            if (library in ARRAY_LIBRARIES and importer not in ARRAY_PACKAGES) or (
                library in COMMAND_LIBRARIES and importer not in COMMAND_PACKAGES
            ):
                wrong.append(f"{path.relative_to(ROOT.parent)}:{line}: {importer} imports {name}")
    assert not wrong, "not allowed on this floor:\n" + "\n".join(wrong)


def test_the_law_is_seen_to_be_broken(tmp_path):
    offender = tmp_path / "offender.py"
    offender.write_text(
        "import numpy.linalg\nfrom kfac_np import cli\n"
        "def f():\n    from kfac_np.curvature.kfac import KFAC\n"
    )
    names = [name for _, name in imports(offender)]
    assert names == ["numpy.linalg", "kfac_np.cli", "kfac_np.curvature.kfac.KFAC"]
    assert not allowed("layers", part_of(names[1]))
    assert not allowed("layers", part_of(names[2]))
    assert not allowed("layers", "losses")
    assert allowed("layers", "statistics")
    assert allowed("trees", "errors")


def test_import_needs_no_optional_library():
    # In a fresh interpreter where they cannot be imported at all.
    hidden = sorted(COMMAND_LIBRARIES | {"cupy", "scipy", "sklearn", "torch"})
    program = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\nimport kfac_np"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
