# SPDX-License-Identifier: Apache-2.0
"""The Fisher diagonal of networks against its definition, and the methods that weigh by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import methods, network
from fewbit.core.facts import Accumulator, Facts
from fewbit.errors import FewbitError, InputError, SpecError
from fewbit.formats import parse
from fewbit.kernels.reference import unfold
from fewbit.model.convolution import window_of
from fewbit.model.hooks import hooked
from fewbit.network.feeding import Batch
from fewbit.network.sensitivity import Loss, samples, sensitivity


class Small(nn.Module):
    """Convolutions, one in groups, one called twice; a linear layer on positions; nothing reaches ``idle``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.last, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        x = self.second(self.second(x).tanh()).relu()
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


NAMES = ["first", "second", "last"]


def small() -> tuple[Small, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    return (
        Small().eval(),
        [torch.randn(size, 3, 6, 5) for size in (4, 1)],
        [torch.tensor([0, 3, 1, 1]), torch.tensor([2])],
    )


def defined(made: nn.Module, names: list[str], losses: list[Callable[[nn.Module], Tensor]]) -> dict[str, Tensor]:
    """Squares of the gradient of each of ``losses``, summed up in float64."""
    exact = made.double()
    weights = [exact.get_submodule(name).weight for name in names]
    totals = [torch.zeros_like(weight).detach() for weight in weights]
    for loss in losses:
        for total, gradient in zip(totals, torch.autograd.grad(loss(exact), weights), strict=True):  # type: ignore[arg-type]
            total += gradient.square()
    made.float()
    return {name: total.flatten(1) for name, total in zip(names, totals, strict=True)}


def test_with_labels_it_is_the_sum_of_squared_gradients_of_every_sample() -> None:
    made, batches, labels = small()
    before = {name: (p.clone(), p.requires_grad) for name, p in made.named_parameters()}
    made.last.weight.grad = torch.ones(4, 6)
    with torch.no_grad():
        found = sensitivity(made, [*NAMES, "idle"], batches, Loss.of(None, labels), 0)  # type: ignore[arg-type]
    assert all(torch.equal(p, before[n][0]) and p.requires_grad is before[n][1] for n, p in made.named_parameters())
    assert torch.equal(made.last.weight.grad, torch.ones(4, 6)) and made.first.weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
    pairs = [(x[i : i + 1], y[i : i + 1]) for x, y in zip(batches, labels, strict=True) for i in range(len(x))]
    expected = defined(made, NAMES, [lambda of, x=x, y=y: F.cross_entropy(of(x.double()), y) for x, y in pairs])
    for name in NAMES:
        torch.testing.assert_close(found[name].fisher.double(), expected[name], rtol=1e-4, atol=1e-9)
    assert not found["idle"].fisher.any() and not found["idle"].output_square.any()
    outputs = {"first": torch.zeros(6), "last": torch.zeros(4)}
    for x, y in pairs:
        conv = made.first(x).detach().requires_grad_()  # which is changed in place after it
        logits = made.last(made.second(made.second(conv.relu()).tanh()).relu().mean((2, 3)))
        at_conv, at_logits = torch.autograd.grad(F.cross_entropy(logits, y), (conv, logits))
        outputs["first"] += at_conv.square().sum((0, 2, 3))
        outputs["last"] += at_logits.square()[0]
    for name, expected_square in outputs.items():
        torch.testing.assert_close(found[name].output_square, expected_square, rtol=1e-4, atol=1e-9)


def test_drawn_labels_and_values_estimate_the_fisher_of_the_output() -> None:
    """On one linear layer, where it is known: p (1 - p) x^2 of classes, x^2 / n^2 of n values."""
    torch.manual_seed(1)
    made, x = nn.Linear(5, 3), torch.randn(4000, 5)
    few = x[:200]
    p = made(x).detach().softmax(1)
    cases = {
        "classes": (x, (p * (1 - p)).T @ x.square(), 0.1),
        "values": (few, few.square().sum(0).expand(3, 5) / 9, 1e-4),  # whatever the signs that are drawn
    }
    for kind, (inputs, expected, rtol) in cases.items():
        loss = Loss.of(kind, None)  # type: ignore[arg-type]
        torch.testing.assert_close(sensitivity(made, [""], [inputs], loss, 7)[""].fisher, expected, rtol=rtol, atol=0)
        again = [sensitivity(made, [""], [few], Loss.of(kind, None), 7)[""].fisher for _ in range(2)]  # type: ignore[arg-type]
        assert torch.equal(*again)


def test_batches_are_cut_into_samples_along_the_first_axis() -> None:
    ids, mask, table = torch.arange(6).reshape(2, 3), torch.ones(2, 3), torch.zeros(1, 3)
    cut = samples({"input_ids": ids, "mask": mask, "table": table, "flag": True, "none": None})
    assert [sorted(part) for part in cut] == [["flag", "input_ids", "mask", "none", "table"]] * 2
    assert torch.equal(cut[1]["input_ids"], ids[1:]) and cut[1]["table"] is table and cut[1]["flag"] is True
    assert [len(part) for part in samples((ids, mask))] == [2, 2] and samples([torch.tensor(3.0)])[0][0] == 3
    assert samples(torch.zeros(0, 3)) == []


def facts_of(made: Small, batches: list[Tensor], name: str) -> Facts:
    layer = made.get_submodule(name)
    total = Accumulator(layer.weight[0].numel())  # type: ignore[index, operator]

    def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        if isinstance(layer, nn.Conv2d):
            window = window_of(layer)
            high, wide = window.out(x)
            x = unfold(x, window, 0, len(x) * high * wide)
        total.add(x.reshape(-1, total.columns))

    with hooked([layer.register_forward_pre_hook(look)]):
        for batch in batches:
            made(batch)
    return total.facts()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("asked", "method"), [("palette2/row", "skm"), ("palette2", "squeezellm"), ("sign/channel", "nanoquant")]
)
@torch.no_grad()
def test_methods_weigh_by_it(asked: str, method: str, sequential: bool, tmp_path: Path) -> None:
    made, batches, labels = small()
    options = {"squeezellm": {"outliers": 0.02, "sensitive": 0.02}, "nanoquant": {"bits": 8.0}}.get(method, {})
    found = network.quantize(made, asked, batches, method=method, options=options, labels=labels, sequential=sequential)
    weighed = sensitivity(made, NAMES, batches, Loss.of("classes", labels), 0)  # type: ignore[arg-type]
    for name in NAMES if not sequential else NAMES[:1]:
        weight = made.get_submodule(name).weight.flatten(1)  # type: ignore[operator, union-attr]
        known = weighed[name].beside(facts_of(made, batches, name))
        expected = methods.named(method)(weight, parse(asked), known, **options).dequantize()
        run = found.network.get_submodule(name).weight_of().dequantize()  # type: ignore[operator]
        assert torch.equal(run, expected)
        even = replace(known, fisher=torch.ones_like(weight), output_square=torch.ones(len(weight)))
        assert not torch.equal(expected, methods.named(method)(weight, parse(asked), even, **options).dequantize())
    (idle,) = [record for record in found.layers if record["name"] == "idle"]
    assert "no calibration token reached it" in idle["note"]
    assert network.save(found, tmp_path / "out")["loss"] == found.loss == "classes, labels given"
    assert torch.equal(network.load(tmp_path / "out", Small())(batches[0]), found.network(batches[0]))


def test_a_function_of_the_user_is_a_loss() -> None:
    made, batches, _ = small()
    wanted = [torch.randn(len(x), 4) for x in batches]
    found = sensitivity(made, NAMES, batches, Loss(lambda y, label: (y[0] - label).square().sum(), wanted), 0)
    pairs = [(x[i : i + 1], y[i]) for x, y in zip(batches, wanted, strict=True) for i in range(len(x))]
    expected = defined(made, NAMES, [lambda of, x=x, y=y: (of(x.double())[0] - y).square().sum() for x, y in pairs])
    for name in NAMES:
        torch.testing.assert_close(found[name].fisher.double(), expected[name], rtol=1e-4, atol=1e-9)


def test_no_loss_and_wrong_labels_are_refused_with_what_would_work() -> None:
    made, batches, labels = small()

    def refused(kind: type[FewbitError], match: str, inputs: list[Batch] = batches, **more: Any) -> None:
        with pytest.raises(kind, match=match):
            network.quantize(made, "palette2", inputs, method="skm", **more)

    refused(InputError, r"skm for first.*labels=\[.*loss=\"classes\".*\"values\"")
    refused(SpecError, "loss='mse'.*classes", loss="mse")
    refused(SpecError, "values.*lambda", loss="values", labels=labels)
    refused(InputError, r"labels of \[4, 1\] samples.*\[4\] samples in 1", labels=labels[:1])
    refused(InputError, r"4 to 4.*4 classes; 0 to 3", labels=[torch.full((4,), 4), labels[1]])
    refused(InputError, "float32 of 1 positions", labels=[torch.zeros(4), labels[1]])
    refused(InputError, "the loss of a sample.*shape.*one number", loss=lambda y, label: y)
    refused(InputError, "no gradient", loss=lambda y, label: y.detach().sum())
    refused(InputError, "inputs=", [], loss="classes")
    bad = torch.full((1, 3, 6, 5), torch.nan)
    refused(InputError, "activations of first", [bad], loss="classes")
    with torch.no_grad():
        made.last.bias.fill_(torch.inf)
    refused(InputError, "activations of last", loss="values")
