// SPDX-License-Identifier: Apache-2.0
// launch.h for Python; the only file that knows pybind11. Pointers come as integers, a tensor as a
// tuple of them, and activesel/_native.py has checked them all.
#include <pybind11/pybind11.h>

#include <array>

#include "launch.h"

namespace py = pybind11;

namespace activesel {
namespace {

template <size_t N>
std::array<int64_t, N> integers(const py::tuple& t) {
  if (t.size() != N)
    throw py::value_error("expected " + std::to_string(N) + " integers, got " +
                          std::to_string(t.size()));
  std::array<int64_t, N> out;
  for (size_t i = 0; i < N; ++i) out[i] = t[i].cast<int64_t>();
  return out;
}

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

Operand operand(const py::tuple& t) {  // kind, pointer, dtype, C, strides of row, token, class
  if (t.empty()) return {Kind::absent, nullptr, Dtype::f32, 0, 0, 0, 0};
  const auto v = integers<7>(t);
  return {Kind(v[0]), pointer<const void>(v[1]), Dtype(v[2]), v[3], v[4], v[5], v[6]};
}

Targets targets_of(const py::tuple& t) {  // pointer, dtype, strides of row, token, class
  if (t.empty()) return {nullptr, Dtype::i64, 0, 0, 0};
  const auto v = integers<5>(t);
  return {pointer<const void>(v[0]), Dtype(v[1]), v[2], v[3], v[4]};
}

int score(const py::tuple& online, const py::tuple& reference, const py::tuple& targets,
          bool sigmoid, float smoothing, int64_t ignore_index, int64_t rows, int64_t tokens,
          int64_t scores, int threads) {
  const Operand a = operand(online), b = operand(reference);
  const Targets y = targets_of(targets);
  const py::gil_scoped_release release;
  return score_cpu(a, b, y, {sigmoid, smoothing, ignore_index}, rows, tokens,
                   pointer<float>(scores), threads);
}

// Reads seed, step and temperature where they are, and writes threshold and flags there.
void select(const py::tuple& online, const py::tuple& reference, const py::tuple& targets,
            bool sigmoid, float smoothing, int64_t ignore_index, int64_t rows, int64_t tokens,
            int known_flags, int64_t seed, int64_t step, int64_t temperature, int64_t offset,
            int64_t k, int64_t scores, int64_t keys, int64_t indices, int64_t threshold,
            int64_t flags, int threads) {
  const Operand a = operand(online), b = operand(reference);
  const Targets y = targets_of(targets);
  const Noise noise = {uint64_t(*pointer<int64_t>(seed)), uint32_t(*pointer<int64_t>(step)), 0,
                       offset};
  const py::gil_scoped_release release;
  *pointer<int32_t>(flags) =
      known_flags | select_cpu(a, b, y, {sigmoid, smoothing, ignore_index}, rows, tokens, noise,
                               *pointer<float>(temperature), k, pointer<float>(scores),
                               pointer<float>(keys), pointer<int64_t>(indices),
                               pointer<float>(threshold), threads);
}

void noise(int64_t seed, int64_t step, int64_t offset, int64_t chunk, int64_t rows, int64_t out,
           int threads) {
  const py::gil_scoped_release release;
  noise_cpu({uint64_t(seed), uint32_t(step), uint32_t(chunk), offset}, rows, pointer<float>(out),
            threads);
}

int topk(int64_t keys, int64_t rows, int64_t k, int64_t indices, int64_t threshold, int threads) {
  const py::gil_scoped_release release;
  return topk_cpu(pointer<const float>(keys), rows, k, pointer<int64_t>(indices),
                  pointer<float>(threshold), threads);
}

// D, image's pointer, dtype, strides of row and column, the same of text; scale, bias
PairSide pair_side(const py::tuple& t, float scale, float bias) {
  if (t.empty()) return {};
  const auto v = integers<9>(t);
  return {{{pointer<const void>(v[1]), Dtype(v[2]), v[3], v[4]},
           {pointer<const void>(v[5]), Dtype(v[6]), v[7], v[8]}},
          v[0],
          scale,
          bias};
}

void joint(const py::tuple& online, const py::tuple& reference, float online_scale,
           float online_bias, float reference_scale, float reference_bias, bool softmax,
           int64_t count, int64_t rows, int64_t at, int64_t chosen, int64_t chunk, int64_t state,
           int64_t stride, int threads) {
  const JointJob job = {{pair_side(online, online_scale, online_bias),
                         pair_side(reference, reference_scale, reference_bias)},
                        softmax,
                        count,
                        pointer<const int64_t>(rows),
                        pointer<const int64_t>(at),
                        chosen,
                        pointer<const int64_t>(chunk),
                        pointer<float>(state),
                        stride};
  const py::gil_scoped_release release;
  joint_cpu(job, threads);
}

#ifdef ACTIVESEL_CUDA
void check(const char* op, int64_t rows, int64_t k, int device, const char* reason) {
  if (reason == nullptr) return;
  throw std::runtime_error(std::string(op) + " of " + std::to_string(rows) +
                           " rows, k = " + std::to_string(k) +
                           ", on cuda:" + std::to_string(device) + ": " + reason);
}

void topk_on_device(int64_t keys, int64_t rows, int64_t k, int64_t partial, int64_t partials,
                    int64_t indices, int64_t threshold, int64_t flags, int64_t workspace,
                    int device, int64_t stream) {
  const char* reason =
      topk_cuda(pointer<const float>(keys), rows, k, pointer<const int32_t>(partial), partials,
                pointer<int64_t>(indices), pointer<float>(threshold), pointer<int32_t>(flags),
                pointer<void>(workspace), device, pointer<void>(stream));
  check("topk", rows, k, device, reason);
}

void select_on_device(const py::tuple& online, const py::tuple& reference, int64_t seed,
                      int64_t step, int64_t temperature, int64_t offset, int64_t rows, int64_t k,
                      int64_t scores, int64_t keys, int64_t indices, int64_t threshold,
                      int64_t flags, int64_t workspace, int device, int64_t stream) {
  const char* reason =
      select_cuda(operand(online), operand(reference), pointer<const int64_t>(seed),
                  pointer<const int64_t>(step), pointer<const float>(temperature), offset, rows, k,
                  pointer<float>(scores), pointer<float>(keys), pointer<int64_t>(indices),
                  pointer<float>(threshold), pointer<int32_t>(flags), pointer<void>(workspace),
                  device, pointer<void>(stream));
  check("select", rows, k, device, reason);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = ACTIVESEL_VERSION;
  m.def("score", &score);
  m.def("select", &select);
  m.def("noise", &noise);
  m.def("topk", &topk);
  m.def("joint", &joint);
  m.def("isa", &isa);
  m.def("set_isa", [](const char* name) {
    if (!set_isa(name))
      throw py::value_error(std::string("isa must be one this machine has, got ") + name);
  });
#ifdef ACTIVESEL_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_version") = cuda_version();
  m.attr("cuda_architectures") = ACTIVESEL_CUDA_ARCHITECTURES;
  m.def("cuda_driver_version", &cuda_driver_version);
  m.def("cuda_device_count", [] {
    const char* reason = nullptr;
    const int count = cuda_device_count(&reason);
    if (count < 0) throw std::runtime_error(reason);
    return count;
  });
  m.def("cuda_probe", [](int device) {
    if (const char* reason = cuda_probe(device)) throw std::runtime_error(reason);
  });
  m.def("topk_cuda_workspace", &topk_cuda_workspace);
  m.def("topk_cuda", &topk_on_device);
  m.def("select_cuda", &select_on_device);
#else
  m.attr("cuda") = false;
#endif
}

}  // namespace activesel
