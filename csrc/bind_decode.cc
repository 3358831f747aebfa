// SPDX-License-Identifier: Apache-2.0
// The part of fewbit._native that generates text: fewbit_decode.h and fewbit_sample.h.
#include "bind.h"

#include <vector>

#include "fewbit_decode.h"
#include "fewbit_sample.h"

namespace {

// A draw in Python: the members of fewbit_draw in their order.
bool draw_of(PyObject* tuple, fewbit_draw* d) {
  unsigned long long logits, seen, counts, biased, bias, seed, position;
  long long vocabulary, top_k, seen_count, bias_count;
  unsigned int branch;
  if (!PyArg_ParseTuple(tuple, "KLffffffLKKLKKLKKI", &logits, &vocabulary, &d->temperature, &d->top_p, &d->min_p,
                        &d->repetition, &d->frequency, &d->presence, &top_k, &seen, &counts, &seen_count, &biased,
                        &bias, &bias_count, &seed, &position, &branch))
    return false;
  d->logits = pointer<float*>(logits), d->vocabulary = vocabulary, d->top_k = top_k;
  d->seen = pointer<const int32_t*>(seen), d->counts = pointer<const int32_t*>(counts), d->seen_count = seen_count;
  d->biased = pointer<const int32_t*>(biased), d->bias = pointer<const float*>(bias), d->bias_count = bias_count;
  d->seed = seed, d->position = position, d->branch = branch;
  return true;
}

// sample(draws, tokens, threads)
PyObject* sample(PyObject*, PyObject* args) {
  PyObject* tuple;
  unsigned long long tokens;
  int threads;
  if (!PyArg_ParseTuple(args, "O!Ki", &PyTuple_Type, &tuple, &tokens, &threads)) return nullptr;
  std::vector<fewbit_draw> draws(static_cast<size_t>(PyTuple_Size(tuple)));
  for (size_t i = 0; i < draws.size(); i++)
    if (!draw_of(PyTuple_GetItem(tuple, static_cast<Py_ssize_t>(i)), &draws[i])) return nullptr;
  return status(released([&] {
    return fewbit_sample(draws.data(), static_cast<int64_t>(draws.size()), pointer<int32_t*>(tokens), threads);
  }));
}

// likeliest(logits, vocabulary, count, tokens) -> log_sum
PyObject* likeliest(PyObject*, PyObject* args) {
  unsigned long long logits, tokens;
  long long vocabulary, count;
  if (!PyArg_ParseTuple(args, "KLLK", &logits, &vocabulary, &count, &tokens)) return nullptr;
  double log_sum = 0;
  const int code = released([&] {
    return fewbit_likeliest(pointer<const float*>(logits), vocabulary, count, pointer<int32_t*>(tokens), &log_sum);
  });
  return code == FEWBIT_OK ? PyFloat_FromDouble(log_sum) : status(code);
}

PyObject* fields_unpack(PyObject*, PyObject* args) {
  unsigned long long packed, codes;
  long long rows, columns;
  int bits, threads;
  if (!PyArg_ParseTuple(args, "KLLiKi", &packed, &rows, &columns, &bits, &codes, &threads)) return nullptr;
  return status(released([&] {
    return fewbit_fields_unpack(pointer<const uint8_t*>(packed), rows, columns, bits, pointer<uint8_t*>(codes),
                                threads);
  }));
}

// rewrite(steps, x, tokens, columns, out, isa, threads); a step is (factor, block, matrix, order).
PyObject* rewrite(PyObject*, PyObject* args) {
  PyObject* given;
  unsigned long long x, out;
  long long tokens, columns;
  int isa, threads;
  if (!PyArg_ParseTuple(args, "OKLLKii", &given, &x, &tokens, &columns, &out, &isa, &threads)) return nullptr;
  std::vector<fewbit_rewrite> steps(static_cast<size_t>(PyTuple_Size(given)));
  for (size_t i = 0; i < steps.size(); i++) {
    unsigned long long factor, matrix;
    long long block, order;
    PyObject* step = PyTuple_GetItem(given, static_cast<Py_ssize_t>(i));
    if (!step || !PyArg_ParseTuple(step, "KLKL", &factor, &block, &matrix, &order)) return nullptr;
    steps[i] = {pointer<const float*>(factor), block, pointer<const float*>(matrix), order};
  }
  return status(released([&] {
    return fewbit_rewrite_tokens(steps.data(), static_cast<int64_t>(steps.size()), pointer<const float*>(x), tokens,
                                 columns, pointer<float*>(out), isa, threads);
  }));
}

// weight_multiply(weight, x, tokens, y, isa, threads); weight: the address of a fewbit_weight.
PyObject* weight_multiply(PyObject*, PyObject* args) {
  unsigned long long weight, x, y;
  long long tokens;
  int isa, threads;
  if (!PyArg_ParseTuple(args, "KKLKii", &weight, &x, &tokens, &y, &isa, &threads)) return nullptr;
  return status(released([&] {
    return fewbit_weight_multiply(pointer<const fewbit_weight*>(weight), pointer<const float*>(x), tokens,
                                  pointer<float*>(y), isa, threads);
  }));
}

// decoder_new(model, kv, sequences) -> the decoder's address; model: that of a fewbit_model, which stays where it is, as
// does all that it points to, until decoder_free.
PyObject* decoder_new(PyObject*, PyObject* args) {
  unsigned long long model;
  long long sequences;
  int kv;
  fewbit_decoder* decoder;
  if (!PyArg_ParseTuple(args, "KiL", &model, &kv, &sequences)) return nullptr;
  const int code = fewbit_decoder_new(pointer<const fewbit_model*>(model), kv, sequences, &decoder);
  if (code != FEWBIT_OK) return status(code);
  return PyLong_FromUnsignedLongLong(static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(decoder)));
}

PyObject* decoder_free(PyObject*, PyObject* args) {
  unsigned long long decoder;
  if (!PyArg_ParseTuple(args, "K", &decoder)) return nullptr;
  fewbit_decoder_free(pointer<fewbit_decoder*>(decoder));
  Py_RETURN_NONE;
}

// decoder_feed(decoder, ((sequence, tokens, count), ...), every, logits, threads); tokens: address of int32
PyObject* decoder_feed(PyObject*, PyObject* args) {
  PyObject* tuple;
  unsigned long long decoder, logits;
  int every, threads;
  if (!PyArg_ParseTuple(args, "KO!pKi", &decoder, &PyTuple_Type, &tuple, &every, &logits, &threads)) return nullptr;
  const Py_ssize_t count = PyTuple_Size(tuple);
  std::vector<fewbit_part> parts(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; i++) {
    long long sequence, tokens_count;
    unsigned long long tokens;
    if (!PyArg_ParseTuple(PyTuple_GetItem(tuple, i), "LKL", &sequence, &tokens, &tokens_count)) return nullptr;
    parts[static_cast<size_t>(i)] = {sequence, tokens_count, pointer<const int32_t*>(tokens)};
  }
  return status(released([&] {
    return fewbit_decoder_feed(pointer<fewbit_decoder*>(decoder), parts.data(), count, every, pointer<float*>(logits),
                               threads);
  }));
}

PyObject* decoder_keep(PyObject*, PyObject* args) {
  unsigned long long decoder;
  long long from, to, length;
  if (!PyArg_ParseTuple(args, "KLLL", &decoder, &from, &to, &length)) return nullptr;
  return status(fewbit_decoder_keep(pointer<fewbit_decoder*>(decoder), from, to, length));
}

PyObject* decoder_bytes(PyObject*, PyObject* args) {
  unsigned long long decoder;
  if (!PyArg_ParseTuple(args, "K", &decoder)) return nullptr;
  return PyLong_FromLongLong(fewbit_decoder_bytes(pointer<const fewbit_decoder*>(decoder)));
}

}  // namespace

PyMethodDef decode_methods[] = {
    {"sample", sample, METH_VARARGS, "(draws, tokens, threads)"},
    {"likeliest", likeliest, METH_VARARGS, "(logits, vocabulary, count, tokens) -> log_sum"},
    {"fields_unpack", fields_unpack, METH_VARARGS, "(packed, rows, columns, bits, codes, threads)"},
    {"rewrite", rewrite, METH_VARARGS, "(steps, x, tokens, columns, out, isa, threads)"},
    {"weight_multiply", weight_multiply, METH_VARARGS, "(weight, x, tokens, y, isa, threads)"},
    {"decoder_new", decoder_new, METH_VARARGS, "(model, kv, sequences) -> decoder; see fewbit_decode.h."},
    {"decoder_free", decoder_free, METH_VARARGS, "(decoder)"},
    {"decoder_feed", decoder_feed, METH_VARARGS, "(decoder, parts, every, logits, threads)"},
    {"decoder_keep", decoder_keep, METH_VARARGS, "(decoder, from, to, length)"},
    {"decoder_bytes", decoder_bytes, METH_VARARGS, "(decoder) -> bytes of keys and values."},
    {nullptr, nullptr, 0, nullptr},
};
