# SPDX-License-Identifier: Apache-2.0
"""What torch does where code names neither dtype nor device, and what autocast makes of products.

A program sets these for models of its own (``torch.set_default_dtype``, ``torch.set_default_device``, ``with
torch.device``, ``with torch.autocast``). They must change no number that is computed here: whoever quantizes enters
:func:`exact` once, where the user comes in, and steps out of it where a network of the user's runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

import torch

_CALLER: ContextVar[tuple[torch.dtype, torch.device] | None] = ContextVar("_CALLER", default=None)
"""The defaults around :func:`exact`; None where it is not open."""


@contextmanager
def exact() -> Iterator[None]:
    """While open, tensors are float32 on the CPU unless code says otherwise, autocast rounds no products, and inference
    mode, in which nothing can learn, is left. Decorates functions too. (torch has one default dtype for all threads of
    a process: others see float32 meanwhile.)

    >>> with torch.autocast("cpu"), exact():
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    token = _CALLER.set((torch.get_default_dtype(), _device()))
    try:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            if torch.is_inference_mode_enabled():  # what learns, or asks for the loss, needs gradients
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(_set(torch.float32, torch.device("cpu")))
            yield
    finally:
        _CALLER.reset(token)


@contextmanager
def of_caller() -> Iterator[None]:
    """While open, inside of :func:`exact`, default dtype and device are again what they were around it; elsewhere this
    does nothing.

    For a network of the user's: its code may rely on them (one of 16 bits that makes its masks in the default dtype
    fails on masks of float32). Autocast stays off: it is a way of running a network faster and less exactly, not a part
    of it, unless its own code enters it.
    """
    caller = _CALLER.get()
    if caller is None:
        yield
        return
    with _set(*caller):
        yield


def products_in(dtype: torch.dtype, device: str = "cpu") -> AbstractContextManager[None]:
    """While open, matrix products round their operands to ``dtype``; sums, and what else is computed, stay float32."""
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def on_cpu() -> AbstractContextManager[None]:
    """While open, tensors are on the CPU unless code says otherwise."""
    return _set(torch.get_default_dtype(), torch.device("cpu"))


@contextmanager
def _set(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Only what differs: a device, once set, costs every call of torch some time."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if device != _device():
            stack.enter_context(device)
        if dtype != before:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, before)
        yield


def _device() -> torch.device:
    """The default one. (What torch says of itself leaves out, in some versions, that ``with torch.device`` is open.)"""
    return torch.empty(0).device
