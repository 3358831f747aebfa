# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as a tree.

::

    FewbitError                 anything fewbit refuses; the text says what was asked, what was found, what would work
    ├── SpecError               a format, scheme, recipe or option is spelt wrong or contradicts itself      exit 2
    ├── InputError              a model, file, tensor or text cannot be used as it is                         exit 3
    │   └── CorruptFileError    bytes on disk are truncated, overlapping, oversized or otherwise hostile
    ├── UnsupportedError        well-formed, but nothing here can do it (no kernel, no family, no extra)      exit 4
    ├── ResumeError             an interrupted run cannot continue: something it depended on has changed      exit 5
    ├── VerificationError       what was written does not read back as what was computed                      exit 6
    └── QualityError            the result is worse than the gate allows; ``--force`` accepts it              exit 7
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FewbitError(Exception):
    """Base of every error that fewbit raises on purpose.

    Args:
        asked: what the caller wanted, e.g. ``"format int4/g7 for a (576, 576) weight in layout q4_0"``.
        found: what stands in the way.
        works: what would work instead.
    """

    exit_code = 1

    def __init__(self, asked: str, found: str = "", works: str = "") -> None:
        self.asked, self.found, self.works = asked, found, works
        super().__init__("; ".join(part for part in (asked, found, works) if part))


class SpecError(FewbitError):
    exit_code = 2


class InputError(FewbitError):
    exit_code = 3


class CorruptFileError(InputError):
    pass


class UnsupportedError(FewbitError):
    exit_code = 4


class ResumeError(FewbitError):
    exit_code = 5


class VerificationError(FewbitError):
    exit_code = 6


class QualityError(FewbitError):
    exit_code = 7


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` of another library says; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def of_layer(name: str) -> Iterator[None]:
    """What fewbit raises while open says that it is about the layer ``name``, if it does not yet."""
    try:
        yield
    except FewbitError as error:
        if name in error.asked:
            raise
        raise type(error)(f"layer {name}: {error.asked}", error.found, error.works) from None
