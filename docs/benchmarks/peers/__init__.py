"""Other libraries, as far as they are installed (`pip install implicitdiff[peers]`): one file for each.

An adapter names its distribution and the works it can do; its file is imported only when the distribution is
found. Each file has `layer(work) -> forward`, where forward(*inputs) gives u with the peer's gradient behind it.
"""

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.work import Forward, Work


@dataclass(frozen=True)
class Adapter:
    """A peer.

    Attributes:
        name: What the tables call it.
        distribution: Its name on PyPI.
        module: The file of this folder.
        works: The families of works it can do.
    """

    name: str
    distribution: str
    module: str
    works: tuple[str, ...]

    @property
    def version(self) -> str | None:
        """The installed version; None if there is none."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def load(self, work: "Work") -> "Forward":
        """The peer's layer for a work; imports the peer."""
        forward: Forward = importlib.import_module(f"{__name__}.{self.module}").layer(work)
        return forward


_QUADRATIC = ("QP layer", "QP backward")
ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter("qpth", "qpth", "with_qpth", _QUADRATIC),
        Adapter("cvxpylayers", "cvxpylayers", "with_cvxpylayers", _QUADRATIC),
        Adapter("torchopt", "torchopt", "with_torchopt", _QUADRATIC),
        Adapter("POT", "POT", "with_pot", ("transport",)),
    )
}


def installed_for(work: "Work") -> list[str]:
    """Names of the installed peers that can do a work."""
    return [a.name for a in ADAPTERS.values() if work.name in a.works and a.version is not None]
