"""Old names of modules and attributes, which lead to the new ones and warn.

One finder serves all the old modules, so that no file has to stay in their place. It answers for names of this package
only, and only where no other finder has found them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

_PACKAGE = __name__.partition(".")[0]
MOVED = {
    "arrays": "common.arrays",
    "checkpoint": "mixture.saving",
    "checks": "common.checks",
    "cli": "commands.cli",
    "code": "mixture.codes",
    "codes": "evaluation.codes",
    "demo": "commands.demo",
    "doctor": "commands.doctor",
    "files": "common.files",
    "fit_report": "mixture.fit_report",
    "fitting.loop": "fitting.fit",
    "fitting.many": "fitting.fit_many",
    "fitting.reservoir": "data.reservoir",
    "fitting.screening": "mixture.screening",
    "fitting.sharded": "fitting.fit_sharded",
    "fitting.source": "data.source",
    "fitting.start": "fitting.initialization",
    "mfa": "mixture.mfa",
    "modes": "common.modes",
    "places": "common.places",
    "ranks": "common.processes",
    "reference_checkpoint": "mixture.paper_format",
    "rotation": "mixture.rotate_loadings",
    "sharded": "mixture.sharded",
    "steering.budget": "steering.calibration",
    "steering.evidence": "steering.active_pairs",
    "steering.functions": "steering.function_hook",
    "steering.live": "steering.interactive",
    "steering.paper": "steering.paper_api",
    "tuning": "commands.tune",
}
"""New names of modules by their old ones, below the package."""


class _Renamed(ModuleType):
    """A module under its old name, whose attributes are those of the new one."""

    def __init__(self, name: str, became: ModuleType) -> None:
        super().__init__(name, became.__doc__)
        self.__dict__["_became"] = became
        names = [name for name in vars(became) if not name.startswith("_")]
        self.__dict__["__all__"] = getattr(became, "__all__", names)

    def __dir__(self) -> list[str]:
        return dir(self.__dict__["_became"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_became"], name)


class _Finder:
    """Finds and loads modules of `MOVED`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        package, _, own = name.partition(".")
        return ModuleSpec(name, self) if package == _PACKAGE and own in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        became = f"{_PACKAGE}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {became} now", FutureWarning, stacklevel=2)
        return _Renamed(spec.name, import_module(became))

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: the new module has been executed."""

    def get_code(self, name: str) -> CodeType:
        """Returns code for `python -m` with the old name of a command line."""
        became = f"{_PACKAGE}.{MOVED[name.partition('.')[2]]}"
        return compile(f"import sys; from {became} import main; sys.exit(main())", name, "exec")


def renamed(module: str, **became: str) -> Callable[[str], Any]:
    """Returns a `__getattr__` for `module` that finds old names (keywords) under new ones (values)."""

    def find(name: str) -> Any:
        if name not in became:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is {became[name]} now", FutureWarning, stacklevel=2)
        return getattr(sys.modules[module], became[name])

    return find


class RenamedAttribute:
    """An old name of an attribute or a method; an object may have one of its own by that name."""

    def __init__(self, became: str) -> None:
        self.became = became

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        warnings.warn(f"this attribute is {self.became} now", FutureWarning, stacklevel=2)
        return getattr(instance, self.became)


def install() -> None:
    """Makes modules be found under their old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # type: ignore[arg-type]
