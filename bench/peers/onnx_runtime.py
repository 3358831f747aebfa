# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's ``MatMulNBits`` in a model of that one node.

    pip install onnx onnxruntime

``accuracy_level`` 4 rounds activations to int8 a block, 0 leaves them float32. Scales are float32 and there are no zero
points: 2^(bits-1) is subtracted. What the session makes of the weights when it loads them is its own affair; ``nbytes``
is what the model stores.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peers.row import SAMPLE, Call, Prepared, Problem, Row, Unavailable, rotated, round_affine

LEVELS = {4: "int8/g{block}", 0: "float32"}
NAME = "nb{bits}/g{block} acc{level}"
KINDS = tuple((bits, block, level) for bits in (8, 4, 2) for block, level in ((128, 4), (32, 4), (128, 0)))


def pack(codes: Tensor, bits: int, block: int) -> Tensor:
    """(rows, columns) one byte each -> (rows, blocks, bytes of a block), lowest bits first."""
    fields = codes.reshape(codes.shape[0], -1, block * bits // 8, 8 // bits).int()
    return (fields << torch.arange(0, 8, bits, dtype=torch.int32)).sum(-1).to(torch.uint8)


def model(packed: Tensor, scale: Tensor, shape: tuple[int, int], tokens: int, attributes: dict[str, int]) -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node("MatMulNBits", ["x", "b", "scales"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, shape[0]])],
        [numpy_helper.from_array(packed.numpy(), "b"), numpy_helper.from_array(scale.numpy().reshape(-1), "scales")],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return made.SerializeToString()  # type: ignore[no-any-return]


def bound(runtime: Any, text: bytes, threads: int, x: Tensor, y: Tensor) -> Call:
    """A session of its own, reading x and writing y where they lie."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, "float32", list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, "float32", list(y.shape), y.data_ptr())

    def call() -> tuple[Tensor, Tensor]:
        session.run_with_iobinding(binding)
        return x, y  # which live as long as the session that points at them

    return call


def prepare(bits: int, block: int, level: int, problem: Problem) -> Prepared:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed; pip install onnx onnxruntime") from error
    rows, columns = problem.shape
    if columns % block:
        raise Unavailable(f"{columns} columns are no multiple of its block of {block}")
    codes, scale = round_affine(problem.weight, bits, block)
    packed = pack(codes, bits, block)
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": level}
    text = model(packed, scale, problem.shape, len(problem.x), attributes)
    x, y = problem.x.contiguous(), torch.empty(len(problem.x), rows)
    nbytes = packed.numel() + 4 * scale.numel()
    try:
        calls = rotated(problem, nbytes, lambda: bound(onnxruntime, text, problem.threads, x, y))
        calls[0]()
    except Exception as error:  # its own errors share no base class
        raise Unavailable(f"onnxruntime {onnxruntime.__version__} refuses: {str(error).splitlines()[0]}") from error
    centred = codes[:SAMPLE].float() - 2 ** (bits - 1)
    held = (centred.reshape(len(centred), -1, block) * scale[:SAMPLE, :, None]).reshape(len(centred), columns)
    return Prepared("MatMulNBits", nbytes, calls, y.clone(), held)


def rows() -> list[Row]:
    return [
        Row(
            "onnxruntime",
            NAME.format(bits=bits, block=block, level=level),
            bits,
            LEVELS[level].format(block=block),
            functools.partial(prepare, bits, block, level),
        )
        for bits, block, level in KINDS
    ]
