# SPDX-License-Identifier: Apache-2.0
"""The table, the choice of a row, and life without the native module."""

from __future__ import annotations

import pickle
import platform
import shutil
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from kernel_cases import raw_matrix

from fewbit import formats, kernels, methods
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.kernels import native
from fewbit.kernels.table import NAMES
from fewbit.kernels.tile16 import pack_codes
from fewbit.kernels.tiled import NativePrepared

LUT = "int24_lut" if "avx2" in native.isas() and "avx512" not in native.isas() else "lut"
"""The family that a table runs on."""
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


def matrix() -> QTensor:
    return raw_matrix("affine", 4, 32, (33, 97), torch.Generator().manual_seed(0))


def test_the_reference_is_last_and_takes_everything() -> None:
    assert NAMES[-1] == "reference" and len(set(NAMES)) == len(NAMES)
    for spelling in formats.EXAMPLES:
        assert kernels.KERNELS[-1].refuse(formats.parse(spelling), (7, 31)) is None


@needs_native
@pytest.mark.parametrize(
    ("spelling", "family"),
    [("int4/g128/sym", "int24"), ("int4/g16", "affine"), ("nf4/g64", LUT), ("palette4/row", "row_lut")],
)
def test_the_best_row_is_chosen_and_better_ones_say_why_not(spelling: str, family: str) -> None:
    choice = kernels.choose(formats.parse(spelling), (4096, 4096))
    assert choice.name == next(row.name for row in kernels.KERNELS if row.family == family and row.isa in native.isas())
    assert all(choice.reasons.values()) and choice.name not in choice.reasons
    assert set(choice.reasons) == set(NAMES[: NAMES.index(choice.name)])


def test_unknown_and_impossible_kernels_are_refused_with_a_reason() -> None:
    with pytest.raises(SpecError, match="affine_linear_serial"):
        kernels.choose(formats.parse("nf4/g64"), (16, 64), "affine_linear_mmx")
    with pytest.raises(UnsupportedError, match="lut" if native.available() else "native"):
        kernels.choose(formats.parse("nf4/g64"), (16, 64), "affine_linear_serial")
    absent = next(row for row in kernels.KERNELS if row.family == "affine" and row.isa not in native.isas())
    with pytest.raises(UnsupportedError, match=str(absent.isa) if native.available() else "native"):
        kernels.choose(formats.parse("int4/g64"), (16, 64), absent.name)


@needs_native
def test_integers_are_chosen_for_int8_activations_only() -> None:
    int8 = formats.parse("int8/g64/sym")
    chosen = kernels.choose(formats.parse("int4/g128/asym"), (64, 256), activation=int8)
    assert chosen.kernel.family == "int8"
    assert kernels.choose(formats.parse("nf4/g64"), (64, 256), activation=int8).kernel.family == "int8_lut"
    for format, activation, reason in [
        ("int4/g128", "int4/g64/sym", "int4/g64/sym"),
        ("int4/g128", "int8/g64/asym", "int8/g64/asym"),
        ("int4/g48", "int8/channel/sym", "one of 48"),
        ("int4/g64", "int8/g48/sym", "one of 48"),
    ]:
        choice = kernels.choose(formats.parse(format), (64, 256), activation=formats.parse(activation))
        assert not choice.kernel.integers and reason in choice.reasons["int8_linear_serial"]
    for format, reason in [("nvfp4", "one of 16"), ("pot7/g64", "at most 6 bits"), ("int4/g48", "lut family")]:
        choice = kernels.choose(formats.parse(format), (64, 256), activation=int8)
        assert not choice.kernel.integers and reason in choice.reasons["int8_lut_linear_serial"]
    assert "stay float" in kernels.choose(formats.parse("int4/g64"), (64, 256)).reasons["int8_linear_serial"]


def test_without_the_native_module_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix()
    x = torch.randn(3, 97)
    expected = kernels.reference.oracle(x, weight)
    monkeypatch.setattr(native, "_load", lambda: (None, "there is no compiler on the moon"))
    monkeypatch.setattr(native, "capabilities", lambda: 0)
    with pytest.warns(RuntimeWarning, match="no compiler on the moon"):
        prepared = kernels.prepare(weight)
    assert prepared.kernel == "reference"
    torch.testing.assert_close(prepared(x).double(), expected, rtol=0, atol=1e-3)
    assert kernels.choose(weight.format, weight.shape).reasons["affine_linear_avx2"].endswith("moon")
    packed = weight.repack(kernels.TILE16)
    assert torch.equal(packed.packed, pack_codes(weight.packed, 4))
    assert torch.equal(packed.logical()[0], weight.packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.prepare(weight, "reference")
    with pytest.raises(UnsupportedError, match="moon"):
        native.core()


@needs_native
def test_what_no_row_takes_runs_on_the_reference_with_one_warning_that_says_why() -> None:
    weight = methods.rtn(
        torch.randn(33, 97, generator=torch.Generator().manual_seed(3)), formats.parse("palette3/row/g20")
    )
    x = torch.randn(3, 97)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        layers = [kernels.prepare(weight) for _ in range(3)]
    (warning,) = [str(one.message) for one in seen]
    assert warning.startswith("fewbit runs on its slow reference: ")
    assert "lut_linear_serial looks up one table in a tile of 16 rows; palette3/row/g20 has one for each row" in warning
    assert "row_lut_linear_serial needs groups of whole chunks of 128 columns; there is one of 20" in warning
    expected = kernels.reference.oracle(x, weight)
    assert all(torch.allclose(layer(x).double(), expected, atol=1e-4) for layer in layers)


def test_a_broken_module_is_absent_not_fatal() -> None:
    program = (
        "import sys; sys.modules['fewbit._native'] = None\n"
        "from fewbit.kernels import native\n"
        "print(native.available(), native.isas(), native.why_not())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.startswith("False () the native module fewbit._native is not usable here")


def test_wrong_inputs_are_refused() -> None:
    prepared = kernels.prepare(matrix(), "reference" if not native.available() else None)
    with pytest.raises(InputError, match="97"):
        prepared(torch.randn(2, 96))
    with pytest.raises(InputError, match="bias"):
        prepared(torch.randn(2, 97), torch.randn(32))
    with pytest.raises(UnsupportedError, match="float64"):
        prepared(torch.randn(2, 97, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="bias on meta"):
        prepared(torch.randn(2, 97), torch.randn(33, device="meta"))
    for threads in (0, -1):
        with pytest.raises(SpecError, match="one at least"):
            kernels.set_threads(threads)


@needs_native
def test_the_core_refuses_what_contradicts_itself() -> None:
    x = torch.zeros(8)
    good = (8, 8, 8, 4, 0, 0, 0, 0.0, x.data_ptr(), x.data_ptr(), 0, 0, 0)
    given = (x.data_ptr(), 1, 8, 1, 0)

    def call(*matrices: Any, x: Any = given, x_block: int = 0, dtype: int = 0, isa: int = 1, threads: int = 1) -> None:
        outputs = tuple((matrix, 0, given[0], 8) for matrix in matrices)
        native.core().linear_many(outputs, x, x_block, dtype, isa, threads)

    wider = (8, 9, 8, 4, *good[4:])
    for at, value in [
        (0, 0),
        (1, -1),
        (2, 9),
        (2, 0),
        (3, 9),
        (3, 0),
        (4, 1),
        (4, 7),
        (8, 0),
        (9, 0),
        (11, 1),
        (12, 1),
    ]:
        bad = (*good[:at], value, *good[at + 1 :])
        for matrices in ((bad,), (good, bad)):
            with pytest.raises(ValueError, match="contradict"):
                call(*matrices)
    for at, value in [(0, 0), (1, -1), (3, -1), (4, 3), (4, -1)]:
        with pytest.raises(ValueError, match="contradict"):
            call(good, x=(*given[:at], value, *given[at + 1 :]))
    for wrong in ({"x_block": -1}, {"dtype": 3}, {"threads": 0}):
        with pytest.raises(ValueError, match="contradict"):
            call(good, **wrong)
    for matrices in ((), (good, wider)):
        with pytest.raises(ValueError, match="contradict"):
            call(*matrices)
    with pytest.raises(RuntimeError, match="instruction set"):
        call(good, isa=next(flag for isa, flag in native.FLAGS.items() if isa not in native.isas()))


OLD_PROCESSOR = """
import ctypes, pickle, sys
from fewbit.kernels import native
assert native.isas() == ("serial",) and "torch" not in sys.modules, native.isas()
matrix, arrays, tokens, columns, calls = pickle.load(sys.stdin.buffer)
held = [ctypes.create_string_buffer(array, len(array)) for array in arrays]
codes, scale, x = (ctypes.addressof(array) for array in held)
matrix = (*matrix[:8], codes, scale, *matrix[10:])
for x_block in calls:
    y = ctypes.create_string_buffer(4 * tokens * matrix[0])
    output = (matrix, 0, ctypes.addressof(y), matrix[0])
    native.core().linear_many((output,), (x, tokens, columns, 1, 0), x_block, 0, native.FLAGS["serial"], 2)
    print(y.raw.hex())
try:
    native.core().linear_many((output,), (x, tokens, columns, 1, 0), 0, 0, native.FLAGS["avx2"], 2)
except RuntimeError as error:
    print(error)
"""


@needs_native
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="not installed: qemu-x86_64")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates an x86-64 without AVX")
def test_a_processor_without_avx_computes_the_same_bits() -> None:
    """Nothing but the files of an instruction set is compiled for it: the emulator has none of theirs."""
    weight = methods.rtn(torch.randn(33, 96, generator=torch.Generator().manual_seed(1)), formats.parse("int4/g32/sym"))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    floats = kernels.prepare(weight, "affine_linear_serial")
    assert isinstance(floats, NativePrepared)
    expected = {
        0: floats(x),
        native.INT24: kernels.prepare(weight, "int24_linear_serial")(x),
        32: kernels.prepare(weight, "int8_linear_serial", formats.parse("int8/g32/sym"))(x),
    }
    ((_, matrix),) = floats._matrices
    arrays = [t.contiguous().numpy().tobytes() for t in (floats.qtensor().packed, floats._scale, x)]
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", "Nehalem", sys.executable, "-c", OLD_PROCESSOR],
        input=pickle.dumps((matrix, arrays, 5, 96, tuple(expected))),
        capture_output=True,
        check=False,
    )
    *found, refusal = done.stdout.decode().splitlines() or [done.stderr.decode()]
    assert [bytes.fromhex(line) for line in found] == [y.numpy().tobytes() for y in expected.values()]
    assert "instruction set" in refusal


def test_every_row_that_can_be_named_has_one_for_sparse_entries_beside_it() -> None:
    for row in kernels.KERNELS:
        beside = kernels.choose_sparse(row)
        assert beside.isa == row.isa or (beside.isa in ("avx2", "neon") and str(row.isa).startswith(beside.isa[:3]))
