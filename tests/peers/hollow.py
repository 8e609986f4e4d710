"""What the peers' modules of formulas import for other ends, and what is large or wants a GPU to be
built, is imported as modules without content: between the import of this module and `end`,
or in `again`."""

import contextlib
import sys
from collections.abc import Iterator, Sequence, Set
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOLLOW = {
    "aiohttp",
    "datasets",
    "deepspeed",
    "einops",
    "flash_attn",
    "pyarrow",
    "pybase64",
    "pylatexenc",
    "swanlab",
    "tabulate",
    "tensorboardX",
    "torchdata",
    "trackio",
    "vllm",
    "wandb",
}
# Parts of a peer that are there, and import what starts processes or serves.
HOLLOW_PARTS = {"areal.experimental", "areal.infra", "skyrl.tinker"}


class Hollow(ModuleType):
    """A module in which every name is an empty class. A formula that used one would fail."""

    __path__: list[str] = []
    __version__ = "0.25.0"  # which TRL knows of vLLM, and pandas takes for no pyarrow

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class HollowLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class HollowFinder(MetaPathFinder):
    """Finds hollow modules by their first names, so many as `depth`."""

    def __init__(self, names: Set[str], depth: int) -> None:
        self.names, self.depth = names, depth

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        first = ".".join(name.split(".")[: self.depth])
        return ModuleSpec(name, HollowLoader()) if first in self.names else None


FINDER = HollowFinder(HOLLOW, depth=1)
FINDER_OF_PARTS = HollowFinder(HOLLOW_PARTS, depth=2)
sys.meta_path.append(FINDER)
sys.meta_path.insert(0, FINDER_OF_PARTS)


@contextlib.contextmanager
def again() -> Iterator[None]:
    """For a while after `end` such modules can be imported once more."""
    if FINDER not in sys.meta_path:
        sys.meta_path.append(FINDER)
    try:
        yield
    finally:
        end()


def end() -> None:
    """Let what a formula imports while it computes be found missing, as it is."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
    for name, module in list(sys.modules.items()):
        if isinstance(module, Hollow):
            del sys.modules[name]
