"""Modules whose weights are in parts on several ranks: a forward pass runs on all ranks at once, or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline.encoders.parts import compute_device, parts_of, place_of, reshard, within

T = TypeVar("T")


class InStep:
    """Runs code that calls parts of a sharded module, on every rank at once.

    What is outside of the called part is gathered first: what FSDP does before and after a forward pass of the
    outermost module, and of those in between, is done around the code.

    Where the code fails on one rank, the others go on to gather the parts that it did not come to. So does this one, in
    the order of the first pass that succeeded, or else in that in which they stand in the module; then it raises.

    Attributes:
        calls: how often code was run here: every rank must come to the same number.
        reached: the parts that the last code called, one after another.
        device: where the module runs.
        place: ranks with the same place must embed the same batches, see `place_of`.
    """

    def __init__(self, module: nn.Module, called: nn.Module | None = None) -> None:
        """`called` is the part whose forward pass the code calls; None for a code that calls any."""
        self.calls: int = 0
        self.device: torch.device = compute_device(module)
        self.place: int = place_of(module)
        self._parts = parts_of(module)
        if called is not None:
            around = [part for part in self._parts if _contains(part, called)]
            self._around = around or [part for part in self._parts if part is called]
            self._inside = [part for part in self._parts if part is called or _contains(called, part)]
        else:
            self._around = [one for one in self._parts if not any(_contains(other, one) for other in self._parts)]
            self._inside = [part for part in self._parts if part not in self._around]
        self._order = self._inside  # as they stand, until it is seen
        self._seen = False
        self.reached: list[Any] = []
        self._running: list[Any] = []

    def __call__(self, code: Callable[..., T], *args: Any, **options: Any) -> T:
        """What `code` gives; the weights are in parts again afterwards."""
        self.calls += 1
        self.reached, self._running = [], []
        hooks = [part.register_forward_pre_hook(self._enter, prepend=True) for part in self._parts]
        hooks += [part.register_forward_hook(self._leave) for part in self._parts]
        found: list[T] = []
        failed: list[Exception] = []

        def attempt() -> None:  # the parts around it are put away as they should be only where nothing is raised
            try:
                found.append(code(*args, **options))
            except Exception as error:
                failed.append(error)
                for part in (*self._running[::-1], *self._order[len(self.reached) :]):
                    within([part], lambda: None)  # ends the pass that failed, or makes one

        try:
            within(self._around, attempt)
        finally:
            for hook in hooks:
                hook.remove()
            for part in self._parts:
                reshard(part)
        if failed:
            raise failed[0]
        if not self._seen:
            self._order, self._seen = self.reached, True
        return found[0]

    def _enter(self, part: Any, _inputs: Any) -> None:
        if part in self._inside:
            self.reached.append(part)
        self._running.append(part)

    def _leave(self, part: Any, _inputs: Any, _output: Any) -> None:
        self._running.remove(part)


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return outer is not inner and any(part is inner for part in outer.modules())


class SameNumber:
    """Has a rank make as many passes as the others, also where it has fewer batches, or fails: then its error waits.

    Where the passes of an encoder need no other rank, it does nothing, and an error is raised at once.
    """

    def __init__(self, in_step: InStep | None, fill: Callable[[int], Any] = lambda _: None) -> None:
        """`fill` makes a pass whose result is not used, in place of that with a number, from 0 on."""
        self.in_step, self.fill = in_step, fill
        self.error: Exception | None = None
        self._before = in_step.calls if in_step else 0
        self._least = 0

    def to(self, least: int) -> SameNumber:
        """With so many passes at the end, also after a failure."""
        self._least = least
        return self

    def __enter__(self) -> None:
        """What may fail."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if self.in_step is None or not isinstance(error, Exception):
            return False
        self.error = self.error or error
        return True

    def fill_up(self, passes: int | None = None) -> None:
        """Makes passes until there were so many, or as many as there must be at the end."""
        wanted = self._least if passes is None else passes
        while self.in_step is not None and (made := self.in_step.calls) - self._before < wanted:
            with self:
                self.fill(made - self._before)
            if self.in_step.calls == made:  # it cannot come so far
                break

    def raise_late(self) -> None:
        """Raises the first error."""
        if self.error is not None:
            raise self.error
