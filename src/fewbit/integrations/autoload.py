# SPDX-License-Identifier: Apache-2.0
"""Registers the transformers plug-in when, and only when, transformers' quantizers are imported.

``import fewbit`` must not import transformers, and transformers has no entry point for quantizers. So a finder waits
for ``transformers.quantizers.auto``, lets it load as always, then adds one row to its two tables.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AWAITED = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    """The module's own loader, followed by our registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register() -> None:
    from fewbit.integrations import transformers

    transformers.register()


def install() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are. Calling twice does nothing."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
