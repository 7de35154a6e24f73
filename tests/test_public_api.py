"""What is public is declared, documented with an example, annotated, and abstract or final."""

from __future__ import annotations

import abc
import enum
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kfac_np


def public_modules() -> list[ModuleType]:
    """Every module of the package but private ones and `__main__`."""
    found = [kfac_np]
    for info in pkgutil.walk_packages(kfac_np.__path__, "kfac_np."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        try:
            found.append(importlib.import_module(info.name))
        except ModuleNotFoundError as error:
            # Kernels for a GPU may be written in CuPy outright.
            if (error.name or "").split(".")[0] not in ("cupy", "cupyx"):
                raise
    return found


def public_objects() -> Iterator[tuple[str, Any]]:
    """Name and value of each public function and class, once, where it is defined."""
    for module in public_modules():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name, None)
            if getattr(value, "__module__", None) == module.__name__ and (
                inspect.isclass(value) or inspect.isfunction(value)
            ):
                yield f"{module.__name__}.{name}", value


def public_methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Name and function of each public method and property that a class itself defines."""
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if inspect.isfunction(function):
            yield name, function


def public_callables() -> Iterator[tuple[str, Any]]:
    """Each public function, class (for its constructor) and method, with its full name."""
    for name, value in public_objects():
        if not (inspect.isclass(value) and has_foreign_constructor(value)):
            yield name, value
        if inspect.isclass(value):
            for method, function in public_methods(value):
                yield f"{name}.{method}", function


def documented_parameters(doc: str) -> list[str]:
    """Names in the Parameters section of a numpydoc docstring."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?:\n\n\w[^\n]*\n---|\Z)", doc, re.S | re.M)
    entries = re.findall(r"^([*\w][^:\n]*?)(?: ?:.*)?$", section[1], re.M) if section else []
    return [name.strip(" *") for entry in entries for name in entry.split(",")]


def is_protocol(cls: type) -> bool:
    return getattr(cls, "_is_protocol", False)


def has_foreign_constructor(cls: type) -> bool:
    """Whether `__init__` is that of Python."""
    return is_protocol(cls) or issubclass(cls, (Exception, enum.Enum))


def report(problem: str, offenders: list[str]) -> None:
    assert not offenders, f"{problem}:\n" + "\n".join(sorted(offenders))


def test_all_names_exist():
    report(
        "without __all__",
        [module.__name__ for module in public_modules() if not hasattr(module, "__all__")],
    )
    report(
        "in __all__ but not defined",
        [
            f"{module.__name__}.{name}"
            for module in public_modules()
            for name in module.__all__
            if not hasattr(module, name)
        ],
    )


def has_example(value: Any) -> bool:
    """Whether a docstring has a doctested example; a class may leave it to one that it fills in."""
    owners = inspect.getmro(value) if inspect.isclass(value) else (value,)
    docs = [inspect.cleandoc(owner.__doc__ or "") for owner in owners]
    return any(re.search(r"^Examples\n-{8}\n(.|\n)*>>> ", doc, re.M) for doc in docs)


def exported() -> set[int]:
    """What the packages themselves have on their lists; the rest are parts of theirs."""
    packages = [module for module in public_modules() if hasattr(module, "__path__")]
    return {id(getattr(package, name)) for package in packages for name in package.__all__}


def test_docstrings_have_examples():
    found = list(public_objects())
    report("without a docstring", [name for name, value in found if not inspect.getdoc(value)])
    names = exported()
    report(
        "exported, without a doctested Examples section of its own or of a class that it fills in",
        [name for name, value in found if id(value) in names and not has_example(value)],
    )


def test_docstrings_have_no_roles():
    # pdoc finds what `name` is by itself, and prints a role of Sphinx, :class:`name`, as it is.
    docs = {module.__name__: module.__doc__ or "" for module in public_modules()}
    docs |= {name: value.__doc__ or "" for name, value in public_callables()}
    docs |= {name: value.__doc__ or "" for name, value in public_objects()}
    report("with a role", [name for name, doc in docs.items() if re.search(r":\w+:`", doc)])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_package_has_a_reference_page():
    command = ["make", "--dry-run", "docs"]
    root = Path(__file__).parents[1]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    pages = re.search(r"pdoc .* build/docs (.*)", printed)[1].split()
    packages = {m.__name__ for m in public_modules() if hasattr(m, "__path__")}
    assert packages | {"kfac_np.errors", "kfac_np.training.checkpoint"} <= set(pages)
    assert set(pages) <= {m.__name__ for m in public_modules()}


def test_methods_have_docstrings():
    # An overriding method may inherit the docstring of what it overrides.
    report(
        "without a docstring, of their own or inherited",
        [
            f"{name}.{method}"
            for name, cls in public_objects()
            if inspect.isclass(cls) and not is_protocol(cls)
            for method, _ in public_methods(cls)
            if not inspect.getdoc(getattr(cls, method))
        ],
    )


def test_documented_parameters_exist():
    stale = []
    for name, function in public_callables():
        known = inspect.signature(function).parameters
        documented = documented_parameters(inspect.cleandoc(function.__doc__ or ""))
        stale += [f"{name}: {extra}" for extra in documented if extra not in known]
    report("documented, but no such parameter", stale)


def test_signatures_are_annotated():
    bare = []
    for name, function in public_callables():
        signature = inspect.signature(function)
        bare += [
            f"{name}: {parameter.name}"
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
        ]
        if inspect.isfunction(function) and signature.return_annotation is signature.empty:
            bare.append(f"{name}: return value")
    report("without annotation", bare)


def test_every_class_is_abstract_or_final():
    # Exceptions form a hierarchy on purpose; an enumeration with members is final by itself.
    def settled(cls: type) -> bool:
        return (
            inspect.isabstract(cls)
            or abc.ABC in cls.__bases__
            or getattr(cls, "__final__", False)
            or is_protocol(cls)
            or issubclass(cls, (BaseException, enum.Enum))
        )

    report(
        "neither abstract nor marked typing.final",
        [
            f"{module.__name__}.{name}"
            for module in public_modules()
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__ and not settled(value)
        ],
    )


def test_version():
    assert kfac_np.__version__ == version("kfac_np")
