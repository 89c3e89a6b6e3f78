"""What the processes of a run do together about a checkpoint: one of them acts, all of them know how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from tokenformer.errors import TokenFormerError

Value = TypeVar("Value")


class Ranks:
    """The processes that write a checkpoint together.

    Args:
        group: a process group with a CPU backend (gloo), used for nothing else at the same time; None for a
            process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)

    def first(self, act: Callable[[], Value]) -> Value:
        """Call ``act`` on the first rank; its value (pickled) or its error reaches all.

        Raises:
            TokenFormerError: on all ranks, what ``act`` raised on the first.
        """
        if self.group is None:
            return act()
        outcome: list[tuple[Value | None, str | None]] = [(None, None)]
        problem: Exception | None = None
        if self.rank == 0:
            try:
                outcome = [(act(), None)]
            except Exception as error:  # told to the others before it goes on its way
                problem = error
                outcome = [(None, str(error) or type(error).__name__)]
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if problem is not None:
            raise problem
        value, message = outcome[0]
        if message is not None:
            raise TokenFormerError(message)
        return value  # type: ignore[return-value]

    def each(self, act: Callable[[], Value]) -> list[Value]:
        """Call ``act`` on every rank; the values (pickled) of all reach all.

        Raises:
            TokenFormerError: on all ranks, what ``act`` raised on the lowest rank where it failed.
        """
        if self.group is None:
            return [act()]
        problem: Exception | None = None
        mine: tuple[Value | None, str | None]
        try:
            mine = (act(), None)
        except Exception as error:
            problem = error
            mine = (None, str(error) or type(error).__name__)
        outcomes: list[tuple[Value | None, str | None]] = [(None, None)] * dist.get_world_size(self.group)
        dist.all_gather_object(outcomes, mine, group=self.group)
        if problem is not None:
            raise problem
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise TokenFormerError(f"rank {rank}: {message}")
        return [value for value, _ in outcomes]  # type: ignore[misc]


def all_ranks() -> Ranks:
    """All processes of the run, in a group of their own; this one alone without torch.distributed."""
    return Ranks(dist.new_group(backend="gloo") if dist.is_initialized() else None)


def greatest_of_all_ranks() -> Callable[[int], int] | None:
    """A function that gives all ranks the greatest of their numbers, over a group of its own; None without
    torch.distributed."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo")

    def greatest(number: int) -> int:
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
        return int(value)

    return greatest
