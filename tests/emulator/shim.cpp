// SPDX-License-Identifier: Apache-2.0
// csrc/topk_cuda.cu for ctypes. Takes what bindings.cpp takes, and hands the kernels memory that is
// full of rubbish and fenced on both sides.
#include "topk_cuda.cu"
using namespace activesel;
template <class T>
struct Fenced {
  std::vector<T> all;
  int64_t size;
  static constexpr int kFence = 64;
  explicit Fenced(int64_t size) : all(size_t(size + 2 * kFence)), size(size) {
    std::mt19937 rubbish(7);
    for (T& x : all) x = T(rubbish());
  }
  T* data() { return all.data() + kFence; }
  bool whole() const {
    const Fenced fresh(size);
    return std::equal(all.begin(), all.begin() + kFence, fresh.all.begin()) &&
           std::equal(all.end() - kFence, all.end(), fresh.all.end() - kFence);
  }
};
template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}
Operand operand(const int64_t* v) {
  return {Kind(v[0]), at<const void>(v[1]), Dtype(v[2]), v[3], v[4], v[5], v[6]};
}
template <class Call>  // call(indices, workspace)
const char* fenced(int64_t rows, int64_t k, int64_t* indices, const Call& call) {
  Fenced<int64_t> out(k);
  Fenced<uint32_t> workspace((topk_cuda_workspace(rows) + 3) / 4);
  const char* reason = call(out.data(), workspace.data());
  if (!out.whole() || !workspace.whole()) return "a kernel wrote past the end";
  std::copy(out.data(), out.data() + k, indices);
  return reason;
}
extern "C" {
int64_t launches() { return std::exchange(emulator::launches, 0); }
void shuffle(int64_t seed) { emulator::dice.seed(unsigned(seed)); }
int64_t current_device() { return emulator::device; }
int64_t workspace(int64_t rows) { return topk_cuda_workspace(rows); }
const char* run_topk(int64_t keys, int64_t rows, int64_t k, int64_t partial, int64_t partials,
                     int64_t indices, int64_t threshold, int64_t flags, int64_t, int64_t device,
                     int64_t stream) {
  if (rows > 1 << 30)  // nothing is read
    return topk_cuda(nullptr, rows, k, nullptr, 0, nullptr, nullptr, nullptr, nullptr, 0, nullptr);
  return fenced(rows, k, at<int64_t>(indices), [&](int64_t* out, void* work) {
    return topk_cuda(at<float>(keys), rows, k, at<int32_t>(partial), partials, out,
                     at<float>(threshold), at<int32_t>(flags), work, int(device), at<void>(stream));
  });
}
const char* run_select(const int64_t* online, const int64_t* reference, int64_t seed, int64_t step,
                       int64_t temperature, int64_t offset, int64_t rows, int64_t k, int64_t scores,
                       int64_t keys, int64_t indices, int64_t threshold, int64_t flags, int64_t,
                       int64_t device, int64_t stream) {
  return fenced(rows, k, at<int64_t>(indices), [&](int64_t* out, void* work) {
    return select_cuda(operand(online), operand(reference), at<int64_t>(seed), at<int64_t>(step),
                       at<float>(temperature), offset, rows, k, at<float>(scores), at<float>(keys),
                       out, at<float>(threshold), at<int32_t>(flags), work, int(device),
                       at<void>(stream));
  });
}
}
