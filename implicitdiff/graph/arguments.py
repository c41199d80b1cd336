"""Everything a declared function may read, as shapes, and the call of its hook on a copy of the Problem.

Comes in: a Problem, its variables and bound inputs. Goes out: ``Arguments``, in the order of the graph's
placeholders. Next file to read: ``record.py``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from implicitdiff.graph.skeleton import skeleton
from implicitdiff.inputs import Bound, variable_name
from implicitdiff.problem import Problem
from implicitdiff.pytrees import Spec, leaf_names, unflatten
from implicitdiff.torch_private import HOST, clean_context


class Fact(NamedTuple):
    """What a function may know of one argument."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True, eq=False)
class Arguments:
    """Everything a declared function may read, as shapes: the variables, the inputs, the Problem's tensors.

    Attributes:
        facts: One per argument, in the order of the graph's placeholders.
        variables: How many of them are variables; they come first.
        variable_spec: Their structure, None where there are none (``init``).
        bound: The bound inputs; their leaves come next, then the tensors of the Problem.
    """

    facts: tuple[Fact, ...]
    variables: int
    variable_spec: Spec | None
    bound: Bound

    def fakes(self) -> list[torch.Tensor]:
        """Fresh fake tensors, one per argument; to be called inside the fake mode."""
        return [torch.empty(fact.shape, dtype=fact.dtype, device=fact.device) for fact in self.facts]

    def call(self, problem: Problem, hook: str, values: Sequence[torch.Tensor], recorder: Any = None) -> Any:
        """Call a hook of the Problem's skeleton on these values."""
        end = self.variables + len(self.bound.leaves)
        tensors = values[end:]
        twin = skeleton(problem, {id(t): v for t, v in zip(self.bound.tensors, tensors, strict=True)})
        arguments = list(self.bound.unflatten(values[self.variables : end]))
        if self.variable_spec is not None and hook != "bounds":
            arguments.insert(0, unflatten(values[: self.variables], self.variable_spec))
        if recorder is None:
            return call_hook(twin, hook, arguments)
        with recorder:
            return call_hook(twin, hook, arguments)


def arguments_of(
    problem: Problem, variables: Sequence[torch.Tensor], variable_spec: Spec | None, bound: Bound
) -> Arguments:
    """The arguments of the declared functions of one sample.

    Args:
        problem: The Problem.
        variables: Leaves of one sample; only shape and dtype count.
        variable_spec: Their structure; None for a hook that takes no variable.
        bound: The inputs. Where they are on the meta device, the graph is made for the device of the
            Problem's tensors, else for torch's default one, since that is where constants that a function
            makes lie (the host if the default is the meta device too: their values are wanted).
    """
    real = [t.device for t in (*bound.leaves, *bound.tensors) if not t.is_meta]
    home = real[0] if real else _home_of_constants()

    def facts(
        names: Sequence[str], tensors: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[Fact]:
        triples = zip(names, tensors, shapes, strict=True)
        return [Fact(n, tuple(s), t.dtype, home if t.is_meta else t.device) for n, t, s in triples]

    on_home = [torch.empty((), dtype=v.dtype, device="meta") for v in variables]
    names = () if variable_spec is None else leaf_names(variable_spec, variable_name(problem))
    return Arguments(
        facts=(
            *facts(names, on_home, [v.shape for v in variables]),
            *facts(bound.names, bound.leaves, bound.sample_shapes),
            *facts(bound.tensor_names, bound.tensors, [t.shape for t in bound.tensors]),
        ),
        variables=len(variables),
        variable_spec=variable_spec,
        bound=bound,
    )


def _home_of_constants() -> torch.device:
    with clean_context():  # torch makes a tensor to find out
        default = torch.get_default_device()
    return HOST if default.type == "meta" else default


def call_hook(problem: Problem, hook: str, arguments: Sequence[Any]) -> Any:
    """The one frame between the library and the user's code, see ``lines.origin``."""
    return getattr(problem, hook)(*arguments)
