"""Turns: one thread at a time runs modules whose weights stream, from its outermost call until that returns.

Hooks cannot see to that: an interrupt runs none, and code that torch compiled for a module without hooks is used again
for one that has them, since its guards look at types and not at hooks. So each module that holds streamed weights,
its own or its children's, gets a class of its own, which differs from the module's in how a call begins and ends.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from djinn.errors import ConfigError

COMPILED = "djinn moves weights in between: compile without fullgraph, or load the model with a budget that holds it"


class Turns:
    """Who may run, and whether somebody does.

    Args:
        recover: called when a thread's turn begins, to mend what an interrupted one may have left.
    """

    def __init__(self, recover: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.running = False
        """Whether a module is running; only the thread that holds the lock may read it."""
        self.beginnings = [recover]
        """Called when a turn begins."""
        self.endings: list[Callable[[], None]] = []
        """Called when a turn ends, however it does, to take away what is there for passes alone."""
        self._forked = False
        self._taking: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        _alive.add(self)

    def cover(self, modules: Iterable[nn.Module]) -> None:
        """Make calls of ``modules`` take turns."""
        for module in modules:
            if "_turns" not in vars(module):
                vars(module)["_turns"] = self
                module.__class__ = _taking_turns(type(module))  # type: ignore[arg-type]
                self._taking.add(module)

    def uncover(self) -> None:
        """Give the modules their own classes back; who would recover is let go, with the memory that it holds."""
        for module in self._taking:
            module.__class__ = type(module).__mro__[2]
            del vars(module)["_turns"]
        self._taking.clear()
        self.beginnings.clear()
        self.endings.clear()

    def begin(self) -> None:
        """Begin the turn of the thread that holds the lock.

        Raises:
            ConfigError: this process is a forked child of the one that loaded the model.
        """
        self._refuse_in_child()
        for prepare in self.beginnings:
            prepare()

    def end(self) -> None:
        """Leave nothing of the turn behind; what an interrupt of this leaves is mended when the next one begins."""
        for tidy in self.endings:
            tidy()

    def _refuse_in_child(self) -> None:
        if self._forked:
            raise ConfigError(
                "this model streams in the process that loaded it, and this one is a fork of it, without its threads; "
                "load the model here, or start this process by spawn instead of fork"
            )

    def forget_parent(self) -> None:
        """Note that this process is a forked child: a lock that another thread held stays locked here for good."""
        self.lock = threading.RLock()
        self.running = False
        self._forked = True

    def refuse_while_running(self, what: str) -> None:
        """Refuse what cannot be done from within a pass; to be called by a thread that holds the lock.

        Raises:
            ConfigError: this thread is in the middle of a pass, or this process is a forked child.
        """
        self._refuse_in_child()
        if self.running:
            raise ConfigError(f"djinn.{what} was called in the middle of a pass; call it when the pass has ended")


_alive: weakref.WeakSet[Turns] = weakref.WeakSet()


def _in_child() -> None:
    for turns in _alive:
        turns.forget_parent()


os.register_at_fork(after_in_child=_in_child)


class _TakesTurns(nn.Module):
    @torch.compiler.disable(recursive=False, reason=COMPILED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        turns: Turns | None = vars(self).get("_turns")
        if turns is None:
            return _own_call(self)(*args, **kwargs)
        # An interrupt may come between any two calls, but not between a lock's own `with` and what it guards.
        with turns.lock:
            call = _own_call(self)
            if turns.running or "_turns" not in vars(self):  # or it was detached while this thread waited
                return call(*args, **kwargs)
            try:
                turns.running = True
                turns.begin()
                return call(*args, **kwargs)
            finally:
                turns.running = False
                turns.end()


def _own_call(module: nn.Module) -> Callable[..., Any]:
    """Return the call of the module's own class, which is its class again if it was detached while a thread waited."""
    return super(_TakesTurns, module).__call__ if isinstance(module, _TakesTurns) else module.__call__


@cache
def _taking_turns(cls: type[nn.Module]) -> type[nn.Module]:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_TakesTurns, cls), names)
