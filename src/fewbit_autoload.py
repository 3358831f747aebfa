# SPDX-License-Identifier: Apache-2.0
"""Lets every program of an environment load fewbit's folders with ``from_pretrained``, without importing fewbit.

transformers has no entry point for quantizers. So ``fewbit.pth`` runs :func:`install` when Python starts, at the cost
of one entry in ``sys.meta_path``: a finder that waits for ``transformers.quantizers.auto``, lets it load as always, and
then adds fewbit's row to its two tables. Nothing of fewbit, torch or transformers is imported until that moment.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

AWAITED = "transformers.quantizers.auto"


class _Loader:
    """The module's own loader, followed by our registration."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        _register()


class _Finder:
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != AWAITED:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        from importlib.machinery import PathFinder

        spec: Any = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register() -> None:
    try:
        from fewbit.integrations import transformers
    except Exception as error:  # a broken fewbit must not take transformers down with it
        warnings.warn(f"fewbit's folders cannot be loaded here: {error}", RuntimeWarning, stacklevel=2)
        return
    transformers.register()


def install() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are. Calling twice does nothing."""
    if AWAITED in sys.modules:
        _register()
    elif not any(
        type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _Finder())
