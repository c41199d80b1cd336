"""What a structured matrix is: a batch of square matrices that stores only its parameters.

Stage: derivatives and structure build operators, solvers invert them. In: tensors whose first axis is the
batch, of size B or 1 (one matrix shared by all samples). Out: matvec, transpose and the dense twin, nothing
else. Next files: ``zero.py`` to ``matrix_free.py``, one kind each; ``products.py`` has the two contractions
they share.
"""

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from implicitdiff.errors import StructureError


class LinearOperator(abc.ABC):
    """A batch of square m x m matrices, known by its kind and its parameters.

    A subclass is a frozen dataclass; its kind is its type, so a structure cannot be mislabelled after
    construction. There is deliberately no sum, product, slice or inverse here: a new query is a function with
    ``functools.singledispatch`` next to its only user.

    Attributes:
        kind: the name of the kind in reports.
        size: m, the number of rows.
        batch: B, or 1 where one matrix serves all samples.
        dtype: the floating dtype of the entries.
        device: where the parameters live.
        symmetric: whether the matrix equals its transpose by construction.
    """

    kind: ClassVar[str]

    if TYPE_CHECKING:
        # Some kinds store these as fields, others derive them from their tensors. A real property here would
        # be taken for the default value of a dataclass field of the same name, so they are only declared.
        @property
        def size(self) -> int: ...
        @property
        def batch(self) -> int: ...
        @property
        def dtype(self) -> torch.dtype: ...
        @property
        def device(self) -> torch.device: ...
        @property
        def symmetric(self) -> bool: ...
    else:
        symmetric = True

    @abc.abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """Return the matrix times a vector, sample by sample.

        Args:
            vector: (..., B, m); a batch axis of 1 is broadcast.

        Returns:
            (..., B, m)
        """

    @abc.abstractmethod
    def transpose(self) -> "LinearOperator":
        """Return the transposed matrix, of the same kind; parameters are shared, never copied."""

    @abc.abstractmethod
    def to_dense(self) -> Tensor:
        """Return the dense twin (B, m, m), to be read only: it may be the stored parameter itself."""


class StoredOperator(LinearOperator):
    """An operator all of whose data are tensors: batch, dtype and device follow from them."""

    @abc.abstractmethod
    def parameters(self) -> tuple[Tensor, ...]:
        """Return every tensor of the operator, each with the batch as its first axis."""

    @property
    def batch(self) -> int:
        """B, the common first axis of the parameters; 1 where all are shared."""
        return common_batch(*self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.parameters()[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.parameters()[0].device


def common_batch(*tensors: Tensor) -> int:
    """Return the broadcast first axis of ``tensors``: B where one has B, else 1."""
    batch = 1
    for tensor in tensors:
        if tensor.shape[0] != 1:
            batch = tensor.shape[0]
    return batch


def check_parameters(kind: str, expected: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Check the shapes of an operator's parameters when it is built.

    Args:
        kind: the kind, for the message.
        expected: for each parameter its tensor and the shape wanted after the batch axis (-1: any size).

    Raises:
        StructureError: a shape differs, or two batch axes are neither equal nor 1, or the dtypes differ.
    """
    if _well_formed(expected):
        return
    shapes = {name: tuple(tensor.shape) for name, (tensor, _) in expected.items()}
    batches = {shape[0] for shape in shapes.values() if shape} - {1}
    for name, (_, wanted) in expected.items():
        got = shapes[name]
        fits = len(got) == 1 + len(wanted) and all(w in (-1, g) for g, w in zip(got[1:], wanted, strict=True))
        if not fits:
            text = ", ".join("any" if w < 0 else str(w) for w in wanted)
            raise StructureError(
                f"{kind}: {name} has shape {got}, expected (batch, {text}). The batch axis comes first and "
                "has size B, or 1 where the parameter is shared by all samples."
            )
    if len(batches) > 1:
        raise StructureError(
            f"{kind}: the batch axes differ: {shapes}. Give each parameter the batch size B, or 1 to share "
            "it."
        )
    dtypes = {tensor.dtype for tensor, _ in expected.values()}
    if len(dtypes) > 1:
        raise StructureError(
            f"{kind}: the parameters have different dtypes {sorted(map(str, dtypes))}; cast them."
        )


def _well_formed(expected: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> bool:
    """Whether there is nothing to report: the ordinary case, without the work of writing messages."""
    batch, dtype = 1, None
    for tensor, wanted in expected.values():
        shape = tensor.shape
        if len(shape) != 1 + len(wanted) or (dtype is not None and tensor.dtype != dtype):
            return False
        dtype = tensor.dtype
        for have, want in zip(shape[1:], wanted, strict=True):
            if want not in (have, -1):
                return False
        if shape[0] != 1:
            if batch not in (1, shape[0]):
                return False
            batch = shape[0]
    return True
