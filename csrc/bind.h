// SPDX-License-Identifier: Apache-2.0
// What the files that see Python share. Pointers come in as integers; whoever calls owns the memory and has checked its
// size. On the limited API of 3.10, so that one wheel serves every later version.
#pragma once

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "fewbit.h"

namespace {

inline PyObject* status(int code) {
  switch (code) {
    case FEWBIT_OK: Py_RETURN_NONE;
    case FEWBIT_NO_MEMORY: return PyErr_NoMemory();
    case FEWBIT_NO_KERNEL: PyErr_SetString(PyExc_RuntimeError, "this processor cannot run that instruction set"); break;
    default: PyErr_SetString(PyExc_ValueError, "arguments contradict one another");
  }
  return nullptr;
}

template <class T>
T pointer(unsigned long long address) {
  return reinterpret_cast<T>(static_cast<uintptr_t>(address));
}

// What `call` gives; other threads run Python meanwhile.
template <class Call>
auto released(Call call) {
  PyThreadState* const thread = PyEval_SaveThread();
  const auto given = call();
  PyEval_RestoreThread(thread);
  return given;
}

}  // namespace

extern PyMethodDef decode_methods[];  // bind_decode.cc
extern PyMethodDef grids_methods[];   // bind_grids.cc
extern PyMethodDef matmul_methods[];  // bind_matmul.cc
