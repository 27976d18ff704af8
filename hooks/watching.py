"""Watching work from outside: how far it is, and a place where it can be stopped."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def watched(each: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call a function ahead of every module's forward call in this thread, whatever analysis makes it.

    What the function raises ends the work as any error in a forward call would: hooks are taken off. It must not
    touch tensors. Work that calls no module (closed forms on weights) is not seen.

    Args:
        each: Given the module.

    Example:
        >>> import torch
        >>> net, seen = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), []
        >>> with watched(lambda module: seen.append(type(module).__name__)):
        ...     _ = net(torch.ones(1, 2))
        >>> seen
        ['Sequential', 'Linear', 'ReLU']
    """
    owner = threading.get_ident()

    def before(module: nn.Module, _: object) -> None:
        if threading.get_ident() == owner:
            each(module)

    handle = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
