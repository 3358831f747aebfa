# SPDX-License-Identifier: Apache-2.0
"""Text from a folder, token by token: the native runtime, and transformers for the families that it does not know."""

from fewbit.decode.engine import Engine, open_engine

__all__ = ["Engine", "open_engine"]
