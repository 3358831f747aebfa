// SPDX-License-Identifier: Apache-2.0
// The part of fewbit._native that serves solvers and layouts: fewbit_grids.h.
#include "bind.h"
#include "fewbit_grids.h"

namespace {

// grid_search((rows, columns, block, count, levels, ends), weight, worth, ratios, scale, zero, isa)
PyObject* grid_search(PyObject*, PyObject* args) {
  fewbit_grid_search_call call = {};
  unsigned long long weight, worth, ratios, scale, zero;
  long long rows, columns, block, count;
  int isa;
  if (!PyArg_ParseTuple(args, "(LLLLii)KKKKKi", &rows, &columns, &block, &count, &call.levels, &call.ends, &weight, &worth,
                        &ratios, &scale, &zero, &isa))
    return nullptr;
  call.rows = rows, call.columns = columns, call.block = block, call.count = count;
  call.weight = pointer<const float*>(weight), call.worth = pointer<const float*>(worth);
  call.ratios = pointer<const float*>(ratios);
  call.scale = pointer<float*>(scale), call.zero = pointer<float*>(zero);
  return status(released([&] { return fewbit_grid_search(&call, isa); }));
}

// Two sums, or what went wrong.
PyObject* sums_or(int code, const double* sums) {
  return code == FEWBIT_OK ? Py_BuildValue("(dd)", sums[0], sums[1]) : status(code);
}

// grid_round((rows, columns, block, levels, given), weight, scale, zero, codes, isa): two sums
PyObject* grid_round(PyObject*, PyObject* args) {
  fewbit_grid_round_call call = {};
  unsigned long long weight, scale, zero, codes;
  long long rows, columns, block;
  int isa;
  if (!PyArg_ParseTuple(args, "(LLLii)KKKKi", &rows, &columns, &block, &call.levels, &call.given, &weight, &scale,
                        &zero, &codes, &isa))
    return nullptr;
  call.rows = rows, call.columns = columns, call.block = block;
  call.weight = pointer<const float*>(weight), call.codes = pointer<uint8_t*>(codes);
  call.scale = pointer<uint16_t*>(scale), call.zero = pointer<uint8_t*>(zero);
  double sums[2];
  call.sums = sums;
  return sums_or(released([&] { return fewbit_grid_round(&call, isa); }), sums);
}

// squares((rows, columns, block), weight, codes, scale, offset, table, isa): two sums
PyObject* squares(PyObject*, PyObject* args) {
  fewbit_squares_call call = {};
  unsigned long long weight, codes, scale, offset, table;
  long long rows, columns, block;
  int isa;
  if (!PyArg_ParseTuple(args, "(LLL)KKKKKi", &rows, &columns, &block, &weight, &codes, &scale, &offset, &table, &isa))
    return nullptr;
  double sums[2];
  call.rows = rows, call.columns = columns, call.block = block, call.sums = sums;
  call.weight = pointer<const float*>(weight), call.codes = pointer<const uint8_t*>(codes);
  call.scale = pointer<const float*>(scale), call.offset = pointer<const float*>(offset);
  call.table = pointer<const float*>(table);
  return sums_or(released([&] { return fewbit_squares(&call, isa); }), sums);
}

// pack_fields(codes, rows, columns, bits, packed), unpack_fields(packed, rows, columns, bits, codes)
template <int (*kMove)(const uint8_t*, int64_t, int64_t, int32_t, uint8_t*)>
PyObject* fields(PyObject*, PyObject* args) {
  unsigned long long from, to;
  long long rows, columns;
  int bits;
  if (!PyArg_ParseTuple(args, "KLLiK", &from, &rows, &columns, &bits, &to)) return nullptr;
  return status(released([&] { return kMove(pointer<const uint8_t*>(from), rows, columns, bits, pointer<uint8_t*>(to)); }));
}

// grid_sweep((rows, columns, block, levels), current, before, (upper, stride), lost, order, scale, zero, codes, isa)
PyObject* grid_sweep(PyObject*, PyObject* args) {
  fewbit_grid_sweep_call call = {};
  unsigned long long current, before, upper, lost, order, scale, zero, codes;
  long long rows, columns, block, stride;
  int isa;
  if (!PyArg_ParseTuple(args, "(LLLi)KK(KL)KKKKKi", &rows, &columns, &block, &call.levels, &current, &before, &upper,
                        &stride, &lost, &order, &scale, &zero, &codes, &isa))
    return nullptr;
  call.rows = rows, call.columns = columns, call.block = block, call.upper_stride = stride;
  call.current = pointer<const float*>(current), call.before = pointer<const float*>(before);
  call.upper = pointer<const float*>(upper), call.lost = pointer<float*>(lost);
  call.order = pointer<const int64_t*>(order), call.codes = pointer<uint8_t*>(codes);
  call.scale = pointer<const float*>(scale), call.zero = pointer<const float*>(zero);
  return status(released([&] { return fewbit_grid_sweep(&call, isa); }));
}

// table_search((rows, blocks, block, count, levels), weight, worth, scales, table, bounds, chosen, isa)
PyObject* table_search(PyObject*, PyObject* args) {
  fewbit_table_search_call call = {};
  unsigned long long weight, worth, scales, table, bounds, chosen;
  long long rows, blocks, block, count;
  int isa;
  if (!PyArg_ParseTuple(args, "(LLLLi)KKKKKKi", &rows, &blocks, &block, &count, &call.levels, &weight, &worth, &scales,
                        &table, &bounds, &chosen, &isa))
    return nullptr;
  call.rows = rows, call.blocks = blocks, call.block = block, call.count = count;
  call.weight = pointer<const float*>(weight), call.worth = pointer<const float*>(worth);
  call.scales = pointer<const float*>(scales), call.table = pointer<const float*>(table);
  call.bounds = pointer<const float*>(bounds), call.chosen = pointer<int64_t*>(chosen);
  return status(released([&] { return fewbit_table_search(&call, isa); }));
}

// table_codes((tables, count, bound_count), values, bounds, codes, isa)
PyObject* table_codes(PyObject*, PyObject* args) {
  unsigned long long values, bounds, codes;
  long long tables, count;
  int bound_count, isa;
  if (!PyArg_ParseTuple(args, "(LLi)KKKi", &tables, &count, &bound_count, &values, &bounds, &codes, &isa)) return nullptr;
  return status(released([&] {
    return fewbit_table_codes(pointer<const float*>(values), tables, count, pointer<const float*>(bounds),
                              bound_count, pointer<uint8_t*>(codes), isa);
  }));
}

// centers((tables, size, count, cells), values, weights, centers)
PyObject* centers(PyObject*, PyObject* args) {
  fewbit_centers_call call = {};
  unsigned long long values, weights, found;
  long long tables, size, count;
  if (!PyArg_ParseTuple(args, "(LLLi)KKK", &tables, &size, &count, &call.cells, &values, &weights, &found)) return nullptr;
  call.tables = tables, call.size = size, call.count = count;
  call.values = pointer<const float*>(values), call.weights = pointer<const float*>(weights);
  call.centers = pointer<double*>(found);
  return status(released([&] { return fewbit_centers(&call); }));
}

// column_sums((rows, columns), x, sums, isa)
PyObject* column_sums(PyObject*, PyObject* args) {
  unsigned long long x, sums;
  long long rows, columns;
  int isa;
  if (!PyArg_ParseTuple(args, "(LL)KKi", &rows, &columns, &x, &sums, &isa)) return nullptr;
  return status(released([&] {
    return fewbit_column_sums(pointer<const float*>(x), rows, columns, pointer<float*>(sums), isa);
  }));
}

}  // namespace

PyMethodDef grids_methods[] = {
    {"grid_search", grid_search, METH_VARARGS,
     "((rows, columns, block, count, levels, ends), weight, worth, ratios, scale, zero, isa)"},
    {"grid_round", grid_round, METH_VARARGS, "((rows, columns, block, levels, given), weight, scale, zero, codes, isa): two sums"},
    {"squares", squares, METH_VARARGS, "((rows, columns, block), weight, codes, scale, offset, table, isa): two sums"},
    {"pack_fields", fields<fewbit_pack_fields>, METH_VARARGS, "(codes, rows, columns, bits, packed)"},
    {"unpack_fields", fields<fewbit_unpack_fields>, METH_VARARGS, "(packed, rows, columns, bits, codes)"},
    {"grid_sweep", grid_sweep, METH_VARARGS,
     "((rows, columns, block, levels), current, before, (upper, stride), lost, order, scale, zero, codes, isa)"},
    {"table_search", table_search, METH_VARARGS,
     "((rows, blocks, block, count, levels), weight, worth, scales, table, bounds, chosen, isa)"},
    {"table_codes", table_codes, METH_VARARGS, "((tables, count, bound_count), values, bounds, codes, isa)"},
    {"centers", centers, METH_VARARGS, "((tables, size, count, cells), values, weights, centers)"},
    {"column_sums", column_sums, METH_VARARGS, "((rows, columns), x, sums, isa)"},
    {nullptr, nullptr, 0, nullptr},
};
