"""Modules whose weights are in parts on several ranks (FSDP2): a forward pass runs on all ranks at once, or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module, or on a part of it."""
    return bool(_sharded(module))


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fully_shard`, which gives it one of its own."""
    kinds = type(module).__mro__
    names = [kind.__name__ for kind in kinds]
    if "FSDPModule" not in names:
        return type(module)
    return next(kind for kind in kinds[1:] if kind.__name__ != "FSDPModule")


class InStep:
    """Runs code that calls parts of a sharded module, on every rank at once.

    What is outside of the called part is gathered first: what `fully_shard` does before and after a forward pass of the
    outermost module, and of those in between, is done around the code.

    Where the code fails on one rank, the others go on to gather the parts that it did not come to. So does this one, in
    the order of the first pass that succeeded, or else in that in which they stand in the module; then it raises.

    Attributes:
        calls: how often code was run here: every rank must come to the same number.
        reached: the parts that the last code called, one after another.
    """

    def __init__(self, module: nn.Module, called: nn.Module | None = None) -> None:
        """`called` is the part whose forward pass the code calls; None for a code that calls any."""
        self.calls: int = 0
        self._parts = _sharded(module)
        if called is not None:
            around = [part for part in self._parts if _contains(part, called)]
            self._around = around or [part for part in self._parts if part is called]
            within = [part for part in self._parts if part is called or _contains(called, part)]
        else:
            self._around = [one for one in self._parts if not any(_contains(other, one) for other in self._parts)]
            within = [part for part in self._parts if part not in self._around]
        self._order = within  # as they stand, until it is seen
        self._seen = False
        self.reached: list[Any] = []

    def __call__(self, code: Callable[..., T], *args: Any, **options: Any) -> T:
        """What `code` gives; the weights are in parts again afterwards."""
        self.calls += 1
        self.reached = []
        hooks = [part.register_forward_pre_hook(self._reach, prepend=True) for part in self._parts]
        found: list[T] = []
        failed: list[Exception] = []

        def attempt() -> None:  # the parts around it are put away as they should be only where nothing is raised
            try:
                found.append(code(*args, **options))
            except Exception as error:
                failed.append(error)
                for part in self._order[len(self.reached) :]:
                    part.unshard()
                    part.reshard()

        try:
            _within(self._around, attempt)
        finally:
            for hook in hooks:
                hook.remove()
            for part in self._parts:
                part.reshard()
        if failed:
            raise failed[0]
        if not self._seen:
            self._order, self._seen = self.reached, True
        return found[0]

    def _reach(self, part: Any, _inputs: Any) -> None:
        self.reached.append(part)


def _within(modules: list[Any], code: Callable[[], T]) -> T:
    """Runs code as if it were the forward pass of each of some modules, from the outermost on."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if not modules:
        return code()
    module, *others = modules
    name = "_run_for_downstream_validation"
    vars(module)[name] = lambda: _within(others, code)
    try:
        register_fsdp_forward_method(module, name)
        result: T = getattr(module, name)()
    finally:
        del vars(module)[name]
    return result


def _sharded(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__)]


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return outer is not inner and any(part is inner for part in outer.modules())


class SameNumber:
    """Has a rank make as many passes as the others, also where it has fewer batches, or fails: then its error waits.

    Where the passes of an encoder need no other rank, it does nothing, and an error is raised at once.
    """

    def __init__(self, in_step: InStep | None, fill: Callable[[], Any] = lambda: None) -> None:
        """`fill` makes a pass whose result is not used."""
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
                self.fill()
            if self.in_step.calls == made:  # it cannot come so far
                break

    def raise_late(self) -> None:
        """Raises the first error."""
        if self.error is not None:
            raise self.error
