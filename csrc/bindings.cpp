// Python bindings of the native code. No torch headers: arguments are numpy arrays or lists, so one build serves
// every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "packing.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU code of or1.";
  m.def("pack_best_fit", &or1::pack_best_fit, py::arg("lengths"), py::arg("capacity"),
        py::call_guard<py::gil_scoped_release>(),
        "Best-fit decreasing packing: lists of sequence indices, one list per bin of at most `capacity` tokens.");
}
