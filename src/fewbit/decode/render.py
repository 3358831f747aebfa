# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates in a process of its own, which its parent starts as a script: it imports nothing of fewbit.

A line of JSON in, ``{"template", "values", "seconds"}``, a line out, ``{"text"}`` or ``{"error"}``. The environment is
that which transformers gives to templates: jinja's immutable sandbox, plain JSON values, and a few names. The system
ends the process where a template takes more processor time or memory than it may, even inside one operation.
"""

import functools
import json
import signal
import sys
import types
from importlib.machinery import PathFinder
from typing import Any

if __name__ == "__main__":  # as package without what its __init__ imports: loaders and caches, 1.5 MiB and 30 ms
    found = PathFinder.find_spec("jinja2")
    sys.modules["jinja2"] = types.ModuleType("jinja2")
    sys.modules["jinja2"].__path__ = list(found.submodule_search_locations or ()) if found else []

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 1 << 30
"""Bytes of address space, the interpreter's own included."""
LONGEST = 1 << 24
"""Characters of a text."""


class Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what an assistant wrote, for training: here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - a name of jinja

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Names(Namespace):
    """A namespace without private names, which could lead out of the sandbox."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *given = arguments
        for name in dict(*given, **named):
            _check_name(name)
        Namespace.__init__(self, *given, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"the private name {name!r}")


def refuse(message: str) -> None:
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)


def now(format: str) -> str:
    import datetime  # which few templates ask for

    return datetime.datetime.now().strftime(format)


@functools.lru_cache(4)
def compiled(template: str) -> Any:
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": now,
        "namespace": Names,
        "dict": lambda *given, **named: dict(*given, **named),
    }
    return environment.from_string(template)


def answer(asked: dict[str, Any]) -> dict[str, str]:
    try:
        text = compiled(asked["template"]).render(**asked["values"])
        return {"text": text} if len(text) <= LONGEST else {"error": f"it makes a text of {len(text)} characters"}
    except Exception as error:  # whatever a template from a folder may do
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # no such thing here: the parent's clock alone bounds a template
        pass
    timed = hasattr(signal, "setitimer")
    for line in sys.stdin:
        asked = json.loads(line)
        if timed:
            signal.setitimer(signal.ITIMER_PROF, asked["seconds"])  # its signal ends the process
        found = answer(asked)
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
