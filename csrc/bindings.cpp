// Python bindings of the native code. No torch headers: arguments are numpy arrays or lists, so one build serves
// every torch version.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "packing.hpp"
#include "score_rows.hpp"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float>;
using Ints = py::array_t<int64_t>;

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

// Check shapes here: the passes index without bounds checks.
or1::RowBlock row_block(const Floats& logits, const Ints& targets, const Floats& inv_tau) {
  expect(logits.ndim() == 2 && logits.shape(1) > 0 && logits.strides(1) == sizeof(float),
         "logits must be [rows, vocab] with vocab >= 1 and adjacent columns");
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  expect(targets.ndim() == 1 && targets.shape(0) == rows && targets.strides(0) == sizeof(int64_t),
         "targets must be a contiguous int64 array with one entry a row of logits");
  expect(inv_tau.ndim() == 1 && inv_tau.shape(0) == rows && inv_tau.strides(0) == sizeof(float),
         "inv_tau must be a contiguous float32 array with one entry a row of logits");
  for (int64_t i = 0; i < rows; ++i) {
    expect(targets.data()[i] >= -1 && targets.data()[i] < vocab,
           "targets[" + std::to_string(i) + "] is " + std::to_string(targets.data()[i]) + ", outside [-1, " +
               std::to_string(vocab) + ")");
  }
  return {const_cast<float*>(logits.data()), targets.data(), inv_tau.data(), rows, vocab,
          logits.strides(0) / int64_t(sizeof(float))};
}

Floats row_sums(const Floats& logits, const Ints& targets, const Floats& inv_tau, float scale, float softcap,
                int threads, const std::string& isa) {
  const auto block = row_block(logits, targets, inv_tau);
  Floats out({py::ssize_t(4), py::ssize_t(block.rows)});
  float* data = out.mutable_data();
  py::gil_scoped_release unlocked;
  or1::row_sums(block, {scale, softcap}, data, threads, isa);
  return out;
}

void row_grads(Floats& logits, const Ints& targets, const Floats& inv_tau, float scale, float softcap,
               const Floats& stats, const Floats& slopes, int threads, const std::string& isa, bool bf16) {
  const auto block = row_block(logits, targets, inv_tau);
  expect(logits.writeable(), "logits must be writeable: they are overwritten with their gradient");
  expect(stats.size() == 4 * block.rows && (stats.flags() & py::array::c_style), "stats must be contiguous [4, rows]");
  expect(slopes.size() == 2 * block.rows && (slopes.flags() & py::array::c_style),
         "slopes must be contiguous [2, rows]");
  py::gil_scoped_release unlocked;
  or1::row_grads(block, {scale, softcap}, stats.data(), slopes.data(), threads, bf16, isa);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU code of or1.";
  m.def("pack_best_fit", &or1::pack_best_fit, py::arg("lengths"), py::arg("capacity"),
        py::call_guard<py::gil_scoped_release>(),
        "Best-fit decreasing packing: lists of sequence indices, one list per bin of at most `capacity` tokens.");
  m.def(
      "plan_ranks",
      [](const std::vector<int64_t>& lengths, int64_t capacity, int64_t ranks, double linear, double quadratic) {
        return or1::plan_ranks(lengths, capacity, ranks, {linear, quadratic});
      },
      py::arg("lengths"), py::arg("capacity"), py::arg("ranks"), py::arg("linear"), py::arg("quadratic"),
      py::call_guard<py::gil_scoped_release>(),
      "plan[rank][row]: lists of sequence indices, as many rows on every rank, balanced by linear * n + quadratic * "
      "n^2.");
  m.def("row_sums", &row_sums, py::arg("logits").noconvert(), py::arg("targets").noconvert(),
        py::arg("inv_tau").noconvert(), py::arg("scale"), py::arg("softcap"), py::arg("threads"), py::arg("isa") = "",
        "Pass 1 over float32 logits [rows, vocab]: float32 [4, rows] = peak, target, rest, moment. softcap 0: none.");
  m.def("row_grads", &row_grads, py::arg("logits").noconvert(), py::arg("targets").noconvert(),
        py::arg("inv_tau").noconvert(), py::arg("scale"), py::arg("softcap"), py::arg("stats").noconvert(),
        py::arg("slopes").noconvert(), py::arg("threads"), py::arg("isa") = "", py::arg("bf16") = false,
        "Pass 2: overwrites logits with their gradient; with bf16, the first half of each row's bytes. stats [4, rows] = "
        "logp, entropy, peak, log_norm; slopes [2, rows] = dL/dlogp, dL/dentropy.");
  m.def("row_isas", &or1::row_isas, "Instruction sets of the row passes on this machine, best first.");
}
