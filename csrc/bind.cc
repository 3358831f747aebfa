// SPDX-License-Identifier: Apache-2.0
// fewbit._native: the C ABI of fewbit.h for Python. With bind_decode.cc the only file that sees Python.
#include "bind.h"

#include <vector>

namespace {

PyObject* caps(PyObject*, PyObject*) { return PyLong_FromLong(fewbit_caps()); }

PyObject* set_threads(PyObject*, PyObject* args) {
  int threads;
  if (!PyArg_ParseTuple(args, "i", &threads)) return nullptr;
  fewbit_set_threads(threads);
  Py_RETURN_NONE;
}

PyObject* tile16_bytes(PyObject*, PyObject* args) {
  long long rows, columns;
  int bits;
  if (!PyArg_ParseTuple(args, "LLi", &rows, &columns, &bits)) return nullptr;
  return PyLong_FromLongLong(fewbit_tile16_bytes(rows, columns, bits));
}

PyObject* tile16_pack(PyObject*, PyObject* args) {
  unsigned long long codes, packed;
  long long stride, rows, columns;
  int bits;
  if (!PyArg_ParseTuple(args, "KLLLiK", &codes, &stride, &rows, &columns, &bits, &packed)) return nullptr;
  return status(released([&] {
    return fewbit_tile16_pack(pointer<const uint8_t*>(codes), stride, rows, columns, bits, pointer<uint8_t*>(packed));
  }));
}

PyObject* tile16_unpack(PyObject*, PyObject* args) {
  unsigned long long codes, packed;
  long long stride, rows, columns;
  int bits;
  if (!PyArg_ParseTuple(args, "KLLiKL", &packed, &rows, &columns, &bits, &codes, &stride)) return nullptr;
  return status(released([&] {
    return fewbit_tile16_unpack(pointer<const uint8_t*>(packed), rows, columns, bits, pointer<uint8_t*>(codes),
                                stride);
  }));
}

PyObject* arrange(PyObject*, PyObject* args) {
  unsigned long long packed;
  long long rows, columns;
  int bits, back;
  if (!PyArg_ParseTuple(args, "LLiiK", &rows, &columns, &bits, &back, &packed)) return nullptr;
  return status(released([&] { return fewbit_arrange(rows, columns, bits, back, pointer<uint8_t*>(packed)); }));
}

PyObject* rowhalves16(PyObject*, PyObject* args) {
  unsigned long long packed;
  long long rows, columns;
  int back;
  if (!PyArg_ParseTuple(args, "LLiK", &rows, &columns, &back, &packed)) return nullptr;
  return status(released([&] { return fewbit_rowhalves16(rows, columns, back, pointer<uint8_t*>(packed)); }));
}

// A matrix in Python: (rows, columns, block, bits, family, scale_half, offset_half, zero, codes, scale, offset, table,
// arranged).
bool matrix_of(PyObject* tuple, fewbit_matrix* matrix) {
  unsigned long long codes, scale, offset, table;
  long long rows, columns, block;
  if (!PyArg_ParseTuple(tuple, "LLLiiiifKKKKi", &rows, &columns, &block, &matrix->bits, &matrix->family,
                        &matrix->scale_half, &matrix->offset_half, &matrix->zero, &codes, &scale, &offset, &table,
                        &matrix->arranged))
    return false;
  matrix->rows = rows, matrix->columns = columns, matrix->block = block;
  matrix->codes = pointer<const uint8_t*>(codes);
  matrix->scale = pointer<const void*>(scale);
  matrix->offset = pointer<const void*>(offset);
  matrix->table = pointer<const float*>(table);
  return true;
}

// An output in Python: (matrix, bias, y, y_stride).
bool output_of(PyObject* tuple, fewbit_matrix* matrix, fewbit_output* output) {
  PyObject* inner;
  unsigned long long bias, y;
  long long y_stride;
  if (!PyArg_ParseTuple(tuple, "OKKL", &inner, &bias, &y, &y_stride) || !matrix_of(inner, matrix)) return false;
  *output = {matrix, pointer<const float*>(bias), pointer<void*>(y), y_stride};
  return true;
}

// linear_many(outputs, x, x_block, y_dtype, isa, threads, scale = 0, zero = 0); x: (data, tokens, stride, step, dtype)
PyObject* linear_many(PyObject*, PyObject* args) {
  PyObject* tuple;
  unsigned long long data;
  long long tokens, stride, step, x_block;
  int x_dtype, y_dtype, isa, threads, zero = 0;
  float scale = 0;
  if (!PyArg_ParseTuple(args, "O!(KLLLi)Liii|fi", &PyTuple_Type, &tuple, &data, &tokens, &stride, &step, &x_dtype,
                        &x_block, &y_dtype, &isa, &threads, &scale, &zero))
    return nullptr;
  const Py_ssize_t count = PyTuple_Size(tuple);
  std::vector<fewbit_matrix> matrices(static_cast<size_t>(count));
  std::vector<fewbit_output> outputs(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; i++)
    if (!output_of(PyTuple_GetItem(tuple, i), &matrices[i], &outputs[i])) return nullptr;
  const fewbit_input x = {pointer<const void*>(data), tokens, stride, step, x_dtype, scale, zero};
  return status(released([&] {
    return fewbit_linear_many(outputs.data(), static_cast<int32_t>(count), &x, x_block, y_dtype, isa, threads);
  }));
}

// sparse_add(matrix, x, y, y_stride, isa, threads); matrix: (rows, columns, index_bytes, value_half, start, order, index,
// value), x as in linear_many
PyObject* sparse_add(PyObject*, PyObject* args) {
  fewbit_sparse matrix;
  fewbit_input input = {};
  unsigned long long start, order, index, value, data, y;
  long long rows, columns, tokens, stride, step, y_stride;
  int isa, threads;
  if (!PyArg_ParseTuple(args, "(LLiiKKKK)(KLLLi)KLii", &rows, &columns, &matrix.index_bytes, &matrix.value_half, &start,
                        &order, &index, &value, &data, &tokens, &stride, &step, &input.dtype, &y, &y_stride, &isa,
                        &threads))
    return nullptr;
  matrix.rows = rows, matrix.columns = columns;
  matrix.start = pointer<const int64_t*>(start);
  matrix.order = pointer<const uint8_t*>(order);
  matrix.index = pointer<const void*>(index);
  matrix.value = pointer<const void*>(value);
  input.data = pointer<const void*>(data);
  input.tokens = tokens, input.stride = stride, input.step = step;
  return status(released([&] { return fewbit_sparse_add(&matrix, &input, pointer<float*>(y), y_stride, isa, threads); }));
}

PyObject* decode(PyObject*, PyObject* args) {
  fewbit_matrix matrix;
  PyObject* tuple;
  unsigned long long out;
  long long begin, end, stride;
  int isa, threads;
  if (!PyArg_ParseTuple(args, "OLLKLii", &tuple, &begin, &end, &out, &stride, &isa, &threads) ||
      !matrix_of(tuple, &matrix))
    return nullptr;
  return status(released([&] { return fewbit_decode(&matrix, begin, end, pointer<float*>(out), stride, isa, threads); }));
}

// A matrix of vectors in Python: (rows, columns, block, dim, bits, residual_bits, half, codes, book, residual).
bool vectors_of(PyObject* tuple, fewbit_vectors* matrix) {
  unsigned long long codes, book, residual;
  long long rows, columns, block;
  if (!PyArg_ParseTuple(tuple, "LLLiiiiKKK", &rows, &columns, &block, &matrix->dim, &matrix->bits,
                        &matrix->residual_bits, &matrix->half, &codes, &book, &residual))
    return false;
  matrix->rows = rows, matrix->columns = columns, matrix->block = block;
  matrix->codes = pointer<const uint8_t*>(codes);
  matrix->book = pointer<const void*>(book);
  matrix->residual = pointer<const void*>(residual);
  return true;
}

// Matrices that are multiplied by a call of their own: (matrix, x, bias, y, y_stride, y_dtype, isa, threads), x as above.
// `of` reads the matrix from its tuple.
template <class Matrix>
PyObject* linear_alone(PyObject* args, bool (*of)(PyObject*, Matrix*),
                       int (*linear)(const Matrix*, const fewbit_input*, const float*, void*, int64_t, int32_t, int32_t,
                                     int32_t)) {
  Matrix matrix;
  PyObject* tuple;
  unsigned long long data, bias, y;
  long long tokens, stride, step, y_stride;
  int x_dtype, y_dtype, isa, threads;
  if (!PyArg_ParseTuple(args, "O(KLLLi)KKLiii", &tuple, &data, &tokens, &stride, &step, &x_dtype, &bias, &y, &y_stride,
                        &y_dtype, &isa, &threads) ||
      !of(tuple, &matrix))
    return nullptr;
  const fewbit_input x = {pointer<const void*>(data), tokens, stride, step, x_dtype};
  return status(released([&] {
    return linear(&matrix, &x, pointer<const float*>(bias), pointer<void*>(y), y_stride, y_dtype, isa, threads);
  }));
}

PyObject* vector_linear(PyObject*, PyObject* args) { return linear_alone(args, vectors_of, fewbit_vector_linear); }

// vector_linear_int8(matrix, x_block, x, bias, y, y_stride, y_dtype, isa, threads); matrix: (rows, columns, block, dim,
// bits, residual_bits, codes, book, step, offset)
PyObject* vector_linear_int8(PyObject*, PyObject* args) {
  fewbit_byte_vectors matrix;
  unsigned long long codes, book, step_of, offset, data, bias, y;
  long long rows, columns, block, x_block, tokens, stride, step, y_stride;
  int x_dtype, y_dtype, isa, threads;
  if (!PyArg_ParseTuple(args, "(LLLiiiKKKK)L(KLLLi)KKLiii", &rows, &columns, &block, &matrix.dim, &matrix.bits,
                        &matrix.residual_bits, &codes, &book, &step_of, &offset, &x_block, &data, &tokens, &stride, &step,
                        &x_dtype, &bias, &y, &y_stride, &y_dtype, &isa, &threads))
    return nullptr;
  matrix.rows = rows, matrix.columns = columns, matrix.block = block;
  matrix.codes = pointer<const uint8_t*>(codes);
  matrix.book = pointer<const uint8_t*>(book);
  matrix.step = pointer<const float*>(step_of);
  matrix.offset = pointer<const float*>(offset);
  const fewbit_input x = {pointer<const void*>(data), tokens, stride, step, x_dtype};
  return status(released([&] {
    return fewbit_vector_linear_int8(&matrix, x_block, &x, pointer<const float*>(bias), pointer<void*>(y), y_stride,
                                     y_dtype, isa, threads);
  }));
}

PyObject* vector_decode(PyObject*, PyObject* args) {
  fewbit_vectors matrix;
  PyObject* tuple;
  unsigned long long out;
  long long begin, end, stride;
  int isa, threads;
  if (!PyArg_ParseTuple(args, "OLLKLii", &tuple, &begin, &end, &out, &stride, &isa, &threads) ||
      !vectors_of(tuple, &matrix))
    return nullptr;
  return status(released([&] {
    return fewbit_vector_decode(&matrix, begin, end, pointer<float*>(out), stride, isa, threads);
  }));
}

// A matrix of rows with tables in Python: (rows, columns, block, table_rows, bits, table_half, codes, table, scale,
// halves).
bool rows_of(PyObject* tuple, fewbit_row_tables* matrix) {
  unsigned long long codes, table, scale;
  long long rows, columns, block, table_rows;
  if (!PyArg_ParseTuple(tuple, "LLLLiiKKKi", &rows, &columns, &block, &table_rows, &matrix->bits, &matrix->table_half,
                        &codes, &table, &scale, &matrix->halves))
    return false;
  matrix->rows = rows, matrix->columns = columns, matrix->block = block, matrix->table_rows = table_rows;
  matrix->codes = pointer<const uint8_t*>(codes);
  matrix->table = pointer<const void*>(table);
  matrix->scale = pointer<const float*>(scale);
  return true;
}

// Its twin with levels of 16 bits: (rows, columns, table_rows, bits, codes, levels, factor, halves).
bool levels_of(PyObject* tuple, fewbit_row_levels* matrix) {
  unsigned long long codes, levels, factor;
  long long rows, columns, table_rows;
  if (!PyArg_ParseTuple(tuple, "LLLiKKKi", &rows, &columns, &table_rows, &matrix->bits, &codes, &levels, &factor,
                        &matrix->halves))
    return false;
  matrix->rows = rows, matrix->columns = columns, matrix->table_rows = table_rows;
  matrix->codes = pointer<const uint8_t*>(codes);
  matrix->levels = pointer<const uint8_t*>(levels);
  matrix->factor = pointer<const float*>(factor);
  return true;
}

PyObject* row_linear(PyObject*, PyObject* args) { return linear_alone(args, rows_of, fewbit_row_linear); }

PyObject* row_linear_int8(PyObject*, PyObject* args) {
  return linear_alone(args, levels_of, fewbit_row_linear_int8);
}

PyObject* row_decode(PyObject*, PyObject* args) {
  fewbit_row_tables matrix;
  PyObject* tuple;
  unsigned long long out;
  long long begin, end, stride;
  int isa, threads;
  if (!PyArg_ParseTuple(args, "OLLKLii", &tuple, &begin, &end, &out, &stride, &isa, &threads) ||
      !rows_of(tuple, &matrix))
    return nullptr;
  return status(released([&] {
    return fewbit_row_decode(&matrix, begin, end, pointer<float*>(out), stride, isa, threads);
  }));
}

// Windows in Python: the members of fewbit_windows in their order.
bool windows_of(PyObject* tuple, fewbit_windows* g) {
  long long values[17];
  if (!PyArg_ParseTuple(tuple, "LLLLLLLLLLLLLLLLLi", &values[0], &values[1], &values[2], &values[3], &values[4],
                        &values[5], &values[6], &values[7], &values[8], &values[9], &values[10], &values[11],
                        &values[12], &values[13], &values[14], &values[15], &values[16], &g->element_bytes))
    return false;
  int64_t* const members[] = {&g->channels, &g->height, &g->width, &g->stride_image, &g->stride_channel,
                              &g->stride_row, &g->stride_column, &g->kernel_h, &g->kernel_w, &g->step_h, &g->step_w,
                              &g->padding_h, &g->padding_w, &g->dilation_h, &g->dilation_w, &g->out_h, &g->out_w};
  for (int i = 0; i < 17; i++) *members[i] = values[i];
  return true;
}

PyObject* unfold(PyObject*, PyObject* args) {
  fewbit_windows windows;
  PyObject* tuple;
  unsigned long long x, out;
  long long begin, end;
  int threads;
  if (!PyArg_ParseTuple(args, "OKLLKi", &tuple, &x, &begin, &end, &out, &threads) || !windows_of(tuple, &windows))
    return nullptr;
  return status(released([&] {
    return fewbit_unfold(&windows, pointer<const void*>(x), begin, end, pointer<void*>(out), threads);
  }));
}

// int8_windows(windows, x, dtype, images, groups, weight, rows, bias, y, isa, threads)
PyObject* int8_windows(PyObject*, PyObject* args) {
  fewbit_windows windows;
  PyObject* tuple;
  unsigned long long x, weight, bias, y;
  long long images, groups, rows;
  int dtype, isa, threads;
  if (!PyArg_ParseTuple(args, "OKiLLKLKKii", &tuple, &x, &dtype, &images, &groups, &weight, &rows, &bias, &y, &isa,
                        &threads) ||
      !windows_of(tuple, &windows))
    return nullptr;
  return status(released([&] {
    return fewbit_int8_windows(&windows, pointer<const void*>(x), dtype, images, groups,
                               pointer<const float*>(weight), rows, pointer<const float*>(bias), pointer<void*>(y),
                               isa, threads);
  }));
}

PyObject* large_pages(PyObject*, PyObject* args) {
  unsigned long long data;
  long long bytes;
  if (!PyArg_ParseTuple(args, "KL", &data, &bytes)) return nullptr;
  fewbit_large_pages(pointer<void*>(data), bytes);
  Py_RETURN_NONE;
}

PyObject* read_stream(PyObject*, PyObject* args) {
  unsigned long long data;
  long long bytes;
  int threads;
  if (!PyArg_ParseTuple(args, "KLi", &data, &bytes, &threads)) return nullptr;
  return PyLong_FromUnsignedLongLong(released([&] {
    return fewbit_read_stream(pointer<const void*>(data), bytes, threads);
  }));
}

PyMethodDef methods[] = {
    {"caps", caps, METH_NOARGS, "What this machine can run, as bits: see fewbit.h."},
    {"set_threads", set_threads, METH_VARARGS, "(threads): for every later call; 0 lets each call say."},
    {"tile16_bytes", tile16_bytes, METH_VARARGS, "(rows, columns, bits) -> bytes, or -1."},
    {"tile16_pack", tile16_pack, METH_VARARGS, "(codes, stride, rows, columns, bits, packed)"},
    {"arrange", arrange, METH_VARARGS, "(rows, columns, bits, back, packed)"},
    {"rowhalves16", rowhalves16, METH_VARARGS, "(rows, columns, back, packed)"},
    {"tile16_unpack", tile16_unpack, METH_VARARGS, "(packed, rows, columns, bits, codes, stride)"},
    {"linear_many", linear_many, METH_VARARGS, "(outputs, x, x_block, y_dtype, isa, threads, scale, zero)"},
    {"sparse_add", sparse_add, METH_VARARGS, "(matrix, x, y, y_stride, isa, threads)"},
    {"decode", decode, METH_VARARGS, "(matrix, tile_begin, tile_end, out, stride, isa, threads)"},
    {"vector_linear", vector_linear, METH_VARARGS, "(matrix, x, bias, y, y_stride, y_dtype, isa, threads)"},
    {"vector_linear_int8", vector_linear_int8, METH_VARARGS,
     "(matrix, x_block, x, bias, y, y_stride, y_dtype, isa, threads)"},
    {"vector_decode", vector_decode, METH_VARARGS, "(matrix, tile_begin, tile_end, out, stride, isa, threads)"},
    {"row_linear", row_linear, METH_VARARGS, "(matrix, x, bias, y, y_stride, y_dtype, isa, threads)"},
    {"row_linear_int8", row_linear_int8, METH_VARARGS, "(matrix, x, bias, y, y_stride, y_dtype, isa, threads)"},
    {"row_decode", row_decode, METH_VARARGS, "(matrix, row_begin, row_end, out, stride, isa, threads)"},
    {"unfold", unfold, METH_VARARGS, "(windows, x, begin, end, out, threads)"},
    {"int8_windows", int8_windows, METH_VARARGS,
     "(windows, x, dtype, images, groups, weight, rows, bias, y, isa, threads)"},
    {"large_pages", large_pages, METH_VARARGS, "(data, bytes) -> None."},
    {"read_stream", read_stream, METH_VARARGS, "(data, bytes, threads) -> exclusive or of the bytes."},
    {nullptr, nullptr, 0, nullptr},
};

// ABI of fewbit/core/compiled.py: both rise when a function's arguments, or what they mean, change.
constexpr long kAbi = 6;

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fewbit._native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native(void) {
  PyObject* made = PyModule_Create(&module);
  for (PyMethodDef* more : {decode_methods, grids_methods, matmul_methods})
    if (made && PyModule_AddFunctions(made, more) < 0) Py_CLEAR(made);
  if (made && PyModule_AddIntConstant(made, "ABI", kAbi) < 0) Py_CLEAR(made);
  return made;
}
