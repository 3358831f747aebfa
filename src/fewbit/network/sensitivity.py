# SPDX-License-Identifier: Apache-2.0
"""The Fisher diagonal of the weights of a network: how much its loss minds a change of each; and of its outputs.

::

    F_ij = sum over samples s of (d L_s / d W_ij)^2            O_i = sum over positions p of (d L_s / d y_pi)^2

of the float network, y what the layer of W makes. L_s is one of

* cross-entropy of classes with labels that are known: the empirical Fisher, as SqueezeLLM takes it (Kim et al. 2023,
  arXiv:2306.07629);
* the same with labels drawn from what the network foretells, one a sample: an unbiased estimate of the Fisher proper
  (Kunstner et al. 2019, arXiv:1905.12558), which needs no labels;
* of values, such as pixels or embeddings, half the mean squared error of what the network makes, y, from y + r, r drawn
  from +1 and -1: the Fisher of normally distributed values, which is that of the Gauss-Newton matrix (Martens 2014,
  arXiv:1412.1193), estimated likewise (Hutchinson 1990). Squares of the output itself would ask what makes it zero;
* a function of the user's.

A sample goes through the network by itself, forward and backward, and the gradient of a weight is squared and let go as
soon as it is known. Memory is that of the activations of one sample, of one gradient, and of the diagonals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.core.facts import Facts
from fewbit.core.sums import all_finite
from fewbit.core.transform import generator_of
from fewbit.errors import InputError, SpecError
from fewbit.model.finite import check_layers
from fewbit.model.hooks import hooked
from fewbit.network.feeding import Batch, call
from fewbit.network.fold import tensors

OwnLoss = Callable[[Any, Any], Tensor]
"""From what the network makes of one sample, and the sample's label (None without labels), to its loss, a scalar."""
CLASSES, VALUES = "classes", "values"
WAYS = 'labels=[one tensor of classes a batch], or loss="classes" (labels are drawn from what it foretells), '
WAYS += 'loss="values" (pixels, embeddings), or loss=a function of output and label'


@dataclass(frozen=True, eq=False)
class Loss:
    """``kind``: "classes", "values", or a function. ``labels``: an entry a batch, each of an entry a sample."""

    kind: str | OwnLoss
    labels: list[Any] | None

    @staticmethod
    def of(kind: str | OwnLoss | None, labels: Iterable[Any] | None) -> Loss | None:
        """As asked for; None where neither is given. Labels alone are those of classes.

        Raises:
            SpecError: there is no loss of that name, or it takes no labels.
        """
        if kind is None and labels is None:
            return None
        if isinstance(kind, str) and kind not in (CLASSES, VALUES):
            raise SpecError(f"loss={kind!r} of a network", "there is none of that name", WAYS)
        if kind == VALUES and labels is not None:
            works = "loss=lambda y, label: (y - label).square().mean()"
            raise SpecError("loss='values' with labels", "what is wanted is drawn around the output itself", works)
        return Loss(CLASSES if kind is None else kind, None if labels is None else list(labels))

    @property
    def name(self) -> str:
        """What a manifest says."""
        if not isinstance(self.kind, str):
            return str(getattr(self.kind, "__qualname__", type(self.kind).__name__))
        if self.kind == VALUES:
            return VALUES
        return f"{self.kind}, labels {'drawn' if self.labels is None else 'given'}"

    def check(self, batches: list[Batch]) -> None:
        """Raises InputError: there are not as many labels as samples."""
        if self.labels is None:
            return
        found = [len(samples(batch)) for batch in batches]
        given = [len(labels) for labels in self.labels]
        if found != given:
            what = f"there are labels of {given} samples in {len(given)} batches"
            works = "one tensor of labels a batch, one label a sample"
            raise InputError(f"labels of {found} samples in {len(found)} batches", what, works)

    def pairs(self, batches: list[Batch]) -> Iterator[tuple[Batch, Any]]:
        """Every sample, and its label, None where it has none."""
        for number, batch in enumerate(batches):
            for index, sample in enumerate(samples(batch)):
                yield sample, None if self.labels is None else self.labels[number][index]

    def __call__(self, output: Any, label: Any, drawn: torch.Generator) -> Tensor:
        """Of one sample.

        Raises:
            InputError: what the network makes cannot be used so.
        """
        if not isinstance(self.kind, str):
            return self.kind(output, label)
        if self.kind == CLASSES:
            return _of_classes(output, label, drawn)
        made = tensors(output)
        if not made:
            raise InputError("the loss of values", "the network makes no tensor of floats", WAYS)
        # its gradient is that of half the mean of (y - y0 - r)^2 at y0
        return torch.stack([(y * _signs(y, drawn)).mean() for y in made]).sum()


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Of one layer: ``fisher`` float32 (rows, columns), ``output_square`` float32 (rows,)."""

    fisher: Tensor
    output_square: Tensor

    def beside(self, facts: Facts) -> Facts:
        return replace(facts, fisher=self.fisher, output_square=self.output_square)


def samples(batch: Batch) -> list[Batch]:
    """``batch`` cut into samples: of every tensor that is as long as the first one, one entry of the first axis."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    count = next((len(part) for part in parts if isinstance(part, Tensor) and part.dim()), 1)

    def cut(part: Any, at: int) -> Any:
        return part[at : at + 1] if isinstance(part, Tensor) and part.dim() and len(part) == count else part

    if isinstance(batch, Mapping):
        return [{key: cut(part, at) for key, part in batch.items()} for at in range(count)]
    if isinstance(batch, (tuple, list)):
        return [tuple(cut(part, at) for part in batch) for at in range(count)]
    return [cut(batch, at) for at in range(count)]


def sensitivity(
    network: nn.Module, names: list[str], batches: list[Batch], loss: Loss, seed: int
) -> dict[str, Sensitivity]:
    """Of the layers ``names``, on every sample of ``batches``, in their order.

    Raises:
        InputError: the loss or a gradient is NaN or infinite, or nothing follows from it; the message names the layer.
    """
    layers = {name: network.get_submodule(name) for name in names}
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    totals = {id(weight): torch.zeros(len(weight), weight[0].numel()) for weight in weights.values()}
    outputs = {name: torch.zeros(len(weight)) for name, weight in weights.items()}
    drawn = generator_of(seed, "labels")

    def let_go(weight: Tensor) -> None:
        assert weight.grad is not None
        totals[id(weight)] += weight.grad.float().square_().flatten(1)
        weight.grad = None

    def of_output(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            axis = 1 if isinstance(layers[name], nn.Conv2d) else -1
            outputs[name] += gradient.float().square().movedim(axis, 0).flatten(1).sum(1)

        def made(module: nn.Module, inputs: Any, y: Tensor) -> None:
            if y.requires_grad:
                y.register_hook(add)

        return made

    with _gradients(network, list(weights.values())):
        apart = {id(weight): weight for weight in weights.values()}  # layers may share one
        at_weights = (weight.register_post_accumulate_grad_hook(let_go) for weight in apart.values())
        at_outputs = (layer.register_forward_hook(of_output(name)) for name, layer in layers.items())
        with hooked(at_weights), hooked(at_outputs), torch.enable_grad():
            for sample, label in loss.pairs(batches):
                output = call(network, sample)
                if not all(map(all_finite, tensors(output))):
                    check_layers(network, "", partial(call, batch=sample))
                _backward(loss(output, label, drawn))
    for name, weight in weights.items():
        if not all_finite(totals[id(weight)]):
            works = "check that the network runs in float on the inputs, and its loss"
            raise InputError(f"the sensitivity of {name}", "the gradient of the loss is NaN or infinite", works)
    return {name: Sensitivity(totals[id(weight)], outputs[name]) for name, weight in weights.items()}


def _backward(loss: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"it is a {type(loss).__name__}" + f" of shape {tuple(loss.shape)}" * isinstance(loss, Tensor)
        raise InputError("the loss of a sample", found, "a tensor of one number")
    if not loss.requires_grad:
        found = "no gradient leads from it to the weights: the network, or the loss, runs without (torch.no_grad)"
        raise InputError("the sensitivity of weights", found, "method clip or gptq, which need no loss")
    loss.backward()


@contextmanager
def _gradients(network: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """While open, ``weights`` alone of the parameters have gradients; afterwards all is as it was."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in network.parameters()]
    wanted = set(map(id, weights))
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted).grad = None
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required).grad = gradient


def _of_classes(output: Any, label: Any, drawn: torch.Generator) -> Tensor:
    """Mean cross-entropy over positions, of logits (1, classes, positions ...)."""
    own = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    made = tensors(output if own is None else own)
    if len(made) != 1 or made[0].dim() < 2:
        found = f"the network makes tensors of {[tuple(y.shape) for y in made]}, not one of (samples, classes, ...)"
        raise InputError("cross-entropy of classes", found, WAYS)
    logits = made[0].float().movedim(1, -1).flatten(0, -2)
    if label is None:
        chosen = torch.multinomial(logits.detach().softmax(1), 1, generator=drawn).flatten()
    else:
        chosen = torch.as_tensor(label).flatten()
        positions, classes = logits.shape
        if chosen.is_floating_point() or len(chosen) != positions:
            found = f"a sample's label is {chosen.dtype} of {len(chosen)} positions, where the output has {positions}"
            raise InputError("labels of classes", found, "one integer a position")
        if not bool(((chosen >= 0) & (chosen < classes)).all()):
            found = f"one of {int(chosen.min())} to {int(chosen.max())}, where the output has {classes} classes"
            raise InputError("labels of classes", found, f"0 to {classes - 1}")
    return nn.functional.cross_entropy(logits, chosen.long())


def _signs(like: Tensor, drawn: torch.Generator) -> Tensor:
    """+1 or -1, each as likely."""
    bits = torch.randint(0, 2, (math.prod(like.shape),), generator=drawn)
    return (2 * bits - 1).reshape(like.shape).to(like)
