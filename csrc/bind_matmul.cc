// SPDX-License-Identifier: Apache-2.0
// The part of fewbit._native that multiplies activations by activations: fewbit_matmul.h.
#include "bind.h"
#include "fewbit_matmul.h"

namespace {

// int8_matmul(a, b, outer, middle, rows, inner, columns, y, isa, threads), an operand being its members, in their order
PyObject* int8_matmul(PyObject*, PyObject* args) {
  fewbit_operand of[2];
  unsigned long long data[2], y;
  long long stride[2][4], outer, middle, rows, inner, columns;
  int isa, threads;
  if (!PyArg_ParseTuple(args, "(KLLLLfii)(KLLLLfii)LLLLLKii", &data[0], &stride[0][0], &stride[0][1], &stride[0][2],
                        &stride[0][3], &of[0].scale, &of[0].zero, &of[0].bits, &data[1], &stride[1][0], &stride[1][1],
                        &stride[1][2], &stride[1][3], &of[1].scale, &of[1].zero, &of[1].bits, &outer, &middle, &rows,
                        &inner, &columns, &y, &isa, &threads))
    return nullptr;
  for (int i = 0; i < 2; i++) {
    of[i].data = pointer<const void*>(data[i]), of[i].stride_outer = stride[i][0], of[i].stride_middle = stride[i][1];
    of[i].stride_row = stride[i][2], of[i].stride_column = stride[i][3];
  }
  return status(released([&] {
    return fewbit_int8_matmul(&of[0], &of[1], outer, middle, rows, inner, columns, pointer<float*>(y), isa, threads);
  }));
}

}  // namespace

PyMethodDef matmul_methods[] = {
    {"int8_matmul", int8_matmul, METH_VARARGS, "(a, b, outer, middle, rows, inner, columns, y, isa, threads)"},
    {nullptr, nullptr, 0, nullptr},
};
