# SPDX-License-Identifier: Apache-2.0
"""Quantized layers as torch modules: copied, pickled, saved and loaded as any other, before and after preparing."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from fewbit import formats, methods
from fewbit.containers import terms as T
from fewbit.core.terms import Dense, Sparse, Terms
from fewbit.errors import VerificationError
from fewbit.layouts.dense import DENSE
from fewbit.model.layers import ExpertBank, QuantEmbedding, QuantLinear

FORMATS = ("sign/channel", "int3/g32/sym", "int4/g32/asym", "nf4/g64", "palette3/row", "vector4x8", "palette4/rows16")


def layer(spelling: str, seed: int = 0, activation: str | None = None) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(96, 40)
    linear.bias.data = torch.randn(40, generator=generator)
    return QuantLinear.of(
        linear, methods.rtn(torch.randn(40, 96, generator=generator), formats.parse(spelling)).repack(DENSE), activation
    )


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


COPIES = {"pickle": lambda module: pickle.loads(pickle.dumps(module)), "deepcopy": copy.deepcopy, "torch.save": saved}


@pytest.mark.parametrize("activation", [None, "int8/channel/sym", "int8/channel/outliers2"])
@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("duplicate", COPIES)
@torch.no_grad()
def test_a_prepared_layer_is_copied_as_any_module(duplicate: str, spelling: str, activation: str | None) -> None:
    made, x = layer(spelling, activation=activation), torch.randn(3, 96)
    expected = made(x)
    twin = COPIES[duplicate](made)
    assert torch.equal(twin(x), expected) and twin.prepared.kernel == made.prepared.kernel
    file = len(pickle.dumps(layer(spelling, activation=activation)))
    assert len(pickle.dumps(made)) < 2 * file + 4096  # not the memory that arrays of all layers lie in


@torch.no_grad()
def test_a_prepared_sum_of_terms_is_copied_as_well() -> None:
    linear, x = nn.Linear(96, 40), torch.randn(3, 96)
    parts = tuple(
        Dense(methods.rtn(torch.randn(40, 96), formats.parse(f)).repack(DENSE))
        for f in ("int4/g32/sym", "int3/g32/sym")
    )
    made = QuantLinear.of(linear, Terms((40, 96), parts))
    expected = made(x)
    assert all(torch.equal(duplicate(made)(x), expected) for duplicate in COPIES.values())


@torch.no_grad()
def test_prepared_layers_go_to_another_process_and_stay_as_they_are_here(tmp_path: Path) -> None:
    """That process saves what came, as nothing else of these tests is there."""
    linear, x = nn.Linear(96, 40), torch.randn(3, 96)
    outliers = torch.where(torch.rand(40, 96) < 0.05, torch.randn(40, 96), 0)
    matrix = methods.rtn(torch.randn(40, 96), formats.parse("int4/g32/sym")).repack(DENSE)
    terms = Terms((40, 96), (Dense(matrix), Sparse.of(outliers)))
    made = nn.ModuleList([*(layer(spelling) for spelling in FORMATS), QuantLinear.of(linear, terms)])
    expected = [each(x) for each in made]
    child = multiprocessing.get_context("spawn").Process(target=torch.save, args=(made, tmp_path / "came"))
    child.start()
    child.join()
    came = torch.load(tmp_path / "came", weights_only=False)
    assert all(torch.equal(twin(x), y) for twin, y in zip(came, expected, strict=True))
    assert all(torch.equal(each(x), y) for each, y in zip(made, expected, strict=True))


@pytest.mark.parametrize("spelling", FORMATS)
@torch.no_grad()
def test_arrays_are_loaded_into_a_layer_that_has_run(spelling: str) -> None:
    first, second, x = layer(spelling, 1), layer(spelling, 2), torch.randn(3, 96)
    expected, other = first(x), second(x)
    assert not torch.equal(expected, other)
    assert str(second.load_state_dict(first.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(second(x), expected) and torch.equal(first(x), expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_"):
        second.load_state_dict({"bias": first.state_dict()["bias"]})


@torch.no_grad()
def test_so_they_are_into_experts_and_into_a_tied_embedding() -> None:
    banks = [ExpertBank("int4/g32/sym", "dense", (16, 64), 3) for _ in range(2)]
    for seed, bank in enumerate(banks):
        weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
        matrix = methods.rtn(weight, formats.parse("int4/g32/sym"))
        for name, array in T.arrays(matrix, bank.plain).items():
            setattr(bank, f"weight_{name}", array)
        bank.prepare()
    x = torch.randn(2, 64)
    expected = x @ banks[0][1]
    banks[1].load_state_dict(banks[0].state_dict())
    assert torch.equal(x @ banks[1][1], expected)
    head, ids = layer("int4/g32/sym"), torch.arange(40)
    tied = QuantEmbedding("int4/g32/sym", "dense", (40, 96), None, torch.float32)
    head.prepare()
    tied.share(head)
    before = tied(ids)
    state = {name: array for name, array in layer("int4/g32/sym", 7).state_dict().items() if name != "bias"}
    tied.load_state_dict(state)
    assert torch.equal(tied(ids), layer("int4/g32/sym", 7).qtensor().dequantize())
    assert torch.equal(head.qtensor().dequantize(), before)


@pytest.mark.parametrize("spelling", FORMATS)
@torch.no_grad()
def test_what_methods_return_is_taken_before_a_layout_is_chosen(spelling: str) -> None:
    matrix, x = methods.rtn(torch.randn(40, 96), formats.parse(spelling)), torch.randn(3, 96)
    made = QuantLinear.of(nn.Linear(96, 40, bias=False), matrix)
    assert torch.allclose(made(x), x @ matrix.dequantize().T, atol=1e-4)
    assert torch.equal(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to", "type"])
@torch.no_grad()
def test_a_cast_changes_dtypes_of_results_and_no_number_of_the_weight(cast: str, run_before: bool) -> None:
    table = QuantEmbedding("int4/g32/asym", "dense", (40, 96), None, torch.float32)
    table.load_state_dict({name: t for name, t in layer("int4/g32/asym").state_dict().items() if name != "bias"})
    made, x, ids = layer("int4/g32/asym"), torch.randn(3, 96), torch.tensor([3, 39])
    stored, rows = made.qtensor().dequantize(), table(ids)
    if run_before:
        made(x)
    for module in (made, table):
        module.to(torch.bfloat16) if cast == "to" else module.type("torch.HalfTensor") if cast == "type" else getattr(
            module, cast
        )()
    dtype = made.weight.dtype
    assert torch.equal(made.qtensor().dequantize(), stored)
    assert table(ids).dtype == dtype and torch.equal(table(ids), rows.to(dtype))
    if dtype != torch.float64:
        assert made(x.to(dtype)).dtype == dtype
    again = made.float()(x) - (x @ stored.T + made.bias)
    assert float(again.abs().max()) < 1e-4


def test_an_array_of_another_dtype_that_was_put_there_is_refused() -> None:
    made = layer("int4/g32/sym")
    made.weight_scale = made.weight_scale.bfloat16()
    with pytest.raises(VerificationError, match="casting a layer's inputs alone"):
        made(torch.randn(3, 96))


@torch.no_grad()
@pytest.mark.filterwarnings("error")
def test_torch_compile_looks_into_no_layer_though_it_is_prepared_there() -> None:
    torch._dynamo.reset()
    first, second, between = layer("int4/g32/asym"), layer("palette3/row", seed=1), nn.Linear(40, 96)
    x, graphs = torch.randn(3, 96), []

    def run(x: torch.Tensor) -> torch.Tensor:
        return second(between(first(x).relu()))  # type: ignore[no-any-return]

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append([node.name for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    compiled = torch.compile(run, backend=backend)
    assert torch.equal(compiled(x), run(x)) and torch.equal(compiled(x), run(x))
    assert len(graphs) == 1 and len(graphs[0]) == 2, graphs  # the ReLU and the float layer


def test_first_calls_may_come_from_several_threads() -> None:
    weight = methods.rtn(torch.randn(256, 64), formats.parse("int4/g32")).repack(DENSE)
    x, interval = torch.randn(2, 64), sys.getswitchinterval()
    expected = (x @ weight.dequantize().T).reshape(2, 8, 32).unbind(1)
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            bank, together = ExpertBank("int4/g32", "dense", (32, 64), 8), threading.Barrier(4)
            bank.load_state_dict({f"weight_{name}": t for name, t in T.arrays(weight, bank.plain).items()})

            def call(expert: int, bank: ExpertBank = bank, together: threading.Barrier = together) -> torch.Tensor:
                together.wait()
                return nn.functional.linear(x, bank[expert])  # type: ignore[arg-type]

            with ThreadPoolExecutor(4) as pool:
                for made, right in zip(pool.map(call, range(4, 8)), expected[4:], strict=True):
                    torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-4)
    finally:
        sys.setswitchinterval(interval)
