// SPDX-License-Identifier: Apache-2.0
// Keys -> the k first rows on the GPU, the keys made from losses on the way if need be.
//
// Rows go by descending order(key), then by ascending row, so every row has a rank of its own. All
// that is asked for follows from the row of rank k, the bar: chosen are the rows before it, and its
// key is the threshold. It is found by counting digits, so ties and NaN cost time, never an answer.
//
// Up to kSmall rows, two launches. The first sorts each block's share of the rows by their leading
// digit; in the second every block finds the bar for itself, from the one bucket that holds it, and
// writes its own share of the result. No block ever waits for another.
// Beyond, one memset and five launches: three that count a digit each, one that counts each block's
// rows above and at the bar, one that writes.
#include "keys.cuh"

namespace activesel {
namespace gpu {

constexpr int64_t kSmall = kWarps * kTile;  // a share for each warp of a block, a tile a share
constexpr int64_t kMaxRows = INT32_MAX, kShares = 512;
static_assert(kShares <= kThreads);

struct Partial {  // flags found before
  const int32_t* words;
  int64_t count;
  __device__ uint32_t flags(unsigned block, unsigned blocks) const {  // the thread's part of them
    uint32_t all = 0;
    for (int64_t i = int64_t(block) * kThreads + threadIdx.x; i < count; i += blocks * kThreads)
      all |= uint32_t(words[i]);
    return all;
  }
};

// ------------------------------------------------------------------------------------ two launches

// Workspace. A code is what follows a row's leading digit: the rest of its order, then its row.
struct Buckets {
  uint64_t* codes;   // [rows], each share sorted by leading digit
  uint16_t* starts;  // [shares, kBins], where each digit begins within its share
  int32_t* flags;    // [shares]
  unsigned shares;
};

constexpr int kRowBits = 4 * kDigit - (32 - kDigit);  // so that a code has four digits
constexpr uint64_t kRowMask = (uint64_t{1} << kRowBits) - 1;
constexpr uint32_t kFew = 256;  // codes that are ranked one against all
static_assert(kSmall <= kRowMask);

__device__ uint32_t leading_bin(uint32_t order) { return kBins - 1 - (order >> (32 - kDigit)); }

__device__ uint64_t code_of(uint32_t order, int64_t row) {
  return uint64_t(order << kDigit >> kDigit) << kRowBits | (kRowMask - uint64_t(row));
}

template <bool kMake>
__global__ void __launch_bounds__(kThreads) sort_shares(Source source, Rows r, Buckets out) {
  __shared__ uint32_t bins[kBins];
  if (kMake) {
    const uint32_t flags = block_or(make_keys(source, r));  // and the keys are there for all
    if (threadIdx.x == 0) out.flags[blockIdx.x] = int32_t(flags);
  }
  clear(bins);
  each_order(source.keys, r, [&](int64_t, uint32_t o) { atomicAdd(&bins[leading_bin(o)], 1u); });
  __syncthreads();
  const uint32_t t = threadIdx.x, a = bins[2 * t], b = bins[2 * t + 1];
  const uint32_t before = block_scan(a + b).before, middle = before + a;
  bins[2 * t] = before;
  bins[2 * t + 1] = middle;
  reinterpret_cast<uint32_t*>(out.starts + blockIdx.x * kBins)[t] = before | middle << 16;
  __syncthreads();
  each_order(source.keys, r, [&](int64_t row, uint32_t o) {
    out.codes[r.first() + atomicAdd(&bins[leading_bin(o)], 1u)] = code_of(o, row);
  });
}

__global__ void __launch_bounds__(kThreads)
    choose_rows(const float* keys, Rows r, Buckets in, Partial partial, Result out) {
  __shared__ uint32_t bins[kBins + 1], found, above, the_bin;
  __shared__ uint64_t few[kFew], bar;
  const uint32_t t = threadIdx.x, k = uint32_t(r.k);

  // The bar's leading digit: the last bin that begins at or before rank k, none if k is all rows.
  uint32_t a = 0, b = 0;
#pragma unroll 8
  for (unsigned s = 0; s < in.shares; ++s) {
    const uint32_t two = reinterpret_cast<const uint32_t*>(in.starts + s * kBins)[t];
    a += two & 0xFFFF;
    b += two >> 16;
  }
  bins[2 * t] = a;
  bins[2 * t + 1] = b;
  if (t == 0) {
    bins[kBins] = uint32_t(r.rows);
    the_bin = kBins;
    found = above = 0;
    bar = 0;
  }
  __syncthreads();
  for (uint32_t bin = 2 * t; bin < 2 * t + 2; ++bin)
    if (bins[bin] <= k && k < bins[bin + 1]) the_bin = bin;
  const bool too_few = bins[kBins - 1] < k;  // only NaN is in the last bin
  __syncthreads();
  const uint32_t bin = the_bin;
  uint32_t rank = k - bins[bin], here = bin < kBins ? bins[bin + 1] - bins[bin] : 0;

  // Each warp reads the candidates of one share.
  int64_t begin = 0, end = 0;
  if (warp() < in.shares) {
    const int64_t first = warp() * r.span, rest = r.rows - first;
    const int64_t size = rest < r.span ? rest : r.span;
    const uint16_t* starts = in.starts + warp() * kBins;
    begin = first + (bin < kBins ? starts[bin] : size);
    end = first + (bin + 1 < kBins ? starts[bin + 1] : size);
    if (lane() == 0 && warp() < blockIdx.x) atomicAdd(&above, uint32_t(begin - first));
  }
  const auto each_code = [&](const auto& use) {
    for (int64_t i = begin + lane(); i < end; i += 4 * 32) {
      uint64_t code[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) code[j] = i + j * 32 < end ? in.codes[i + j * 32] : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (i + j * 32 < end) use(code[j]);
    }
  };
  uint64_t prefix = 0;
  int shift = 4 * kDigit;
  __syncthreads();  // the bins have been read
  while (here > kFew) {
    clear(bins);
    each_code([&](uint64_t code) {
      const uint32_t digit = uint32_t(code >> (shift - kDigit)) & (kBins - 1);
      if (code >> shift == prefix) atomicAdd(&bins[kBins - 1 - digit], 1u);
    });
    __syncthreads();
    const Place place = find(bins, rank);
    shift -= kDigit;
    prefix = prefix << kDigit | (kBins - 1 - place.bin);
    rank -= place.before;
    here = place.here;
  }
  uint32_t chosen = 0;
  each_code([&](uint64_t code) {
    if (code >> shift == prefix) few[atomicAdd(&found, 1u)] = code;
    chosen += code >> shift > prefix;
  });
  if (chosen && warp() < blockIdx.x) atomicAdd(&above, chosen);
  __syncthreads();
  if (t < here) {
    uint32_t better = 0;
    for (uint32_t i = 0; i < here; ++i) better += few[i] > few[t];
    const int64_t row = int64_t(kRowMask - (few[t] & kRowMask));
    if (better < rank && row < r.first()) atomicAdd(&above, 1u);
    if (better == rank) bar = few[t];
  }
  __syncthreads();

  const uint64_t least = bar;
  write(keys, r, out, above, 0, 0, [&](int64_t row, uint32_t o) {
    const uint32_t own = leading_bin(o);
    if (own != bin) return own < bin ? 1 : 0;
    const uint64_t code = code_of(o, row);
    return code == least ? 2 : (code > least ? 1 : 0);
  });
  if (blockIdx.x == 0) {
    const uint32_t flags = block_or(partial.flags(0, 1)) | (too_few ? kTooFewRows : 0);
    if (t == 0) *out.flags = int32_t(flags);
    if (t == 0 && r.k == r.rows) *out.threshold = unorder(0);
  }
}

// ---------------------------------------------------------------------------------------- beyond

struct State {                  // workspace, zeroed first
  uint32_t bins[3][kBins];      // of all rows that share the digits found before
  uint32_t bar, rank;           // digits found so far; the rank among the rows that share them
  uint32_t flags, finished[4];  // blocks, of each launch
};

struct Counts {
  State* state;
  uint32_t *above, *ties;  // [shares]; of each block, then of those before it
};

// Whether this block is the last to finish: it then sees what all the others have written.
__device__ bool is_last(uint32_t* finished) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(finished, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// Three digits make 33 bits: an order, and a zero below.
template <int kPass, bool kMake>
__global__ void __launch_bounds__(kThreads)
    count_digit(Source source, Rows r, Partial partial, Counts c) {
  __shared__ uint32_t bins[kBins];
  State& state = *c.state;
  constexpr int kShift = 22 - kPass * kDigit;
  if (kPass == 0) {
    const uint32_t made = kMake ? make_keys(source, r) : 0;
    const uint32_t flags = block_or(made | partial.flags(blockIdx.x, gridDim.x));
    if (threadIdx.x == 0 && flags) atomicOr(&state.flags, flags);
  }
  const uint32_t prefix = state.bar, rank = kPass == 0 ? uint32_t(r.k) : state.rank;
  clear(bins);
  each_order(source.keys, r, [&](int64_t, uint32_t o) {
    const uint64_t digits = uint64_t(o) << 1 >> kShift;
    if (digits >> kDigit == prefix) atomicAdd(&bins[kBins - 1 - (digits & (kBins - 1))], 1u);
  });
  __syncthreads();
  for (uint32_t bin = threadIdx.x; bin < kBins; bin += kThreads)
    if (bins[bin]) atomicAdd(&state.bins[kPass][bin], bins[bin]);
  if (!is_last(&state.finished[kPass])) return;
  for (uint32_t bin = threadIdx.x; bin < kBins; bin += kThreads)
    bins[bin] = __ldcg(&state.bins[kPass][bin]);
  __syncthreads();
  const Place place = find(bins, rank);
  if (threadIdx.x != 0) return;
  const uint64_t digits = uint64_t(prefix) << kDigit | (kBins - 1 - place.bin);
  state.bar = uint32_t(kPass == 2 ? digits >> 1 : digits);
  state.rank = rank - place.before;
  if (kPass == 0 && r.rows - bins[kBins - 1] < r.k) atomicOr(&state.flags, uint32_t(kTooFewRows));
}

__global__ void __launch_bounds__(kThreads) count_shares(const float* keys, Rows r, Counts c) {
  const uint32_t bar = c.state->bar, t = threadIdx.x;
  uint32_t above = 0, ties = 0;
  each_order(keys, r, [&](int64_t, uint32_t o) {
    above += o > bar;
    ties += o == bar;
  });
  above = block_scan(above).total;
  ties = block_scan(ties).total;
  if (t == 0) {
    c.above[blockIdx.x] = above;
    c.ties[blockIdx.x] = ties;
  }
  if (!is_last(&c.state->finished[3])) return;
  above = block_scan(t < gridDim.x ? __ldcg(&c.above[t]) : 0).before;
  ties = block_scan(t < gridDim.x ? __ldcg(&c.ties[t]) : 0).before;
  if (t < gridDim.x) {
    c.above[t] = above;
    c.ties[t] = ties;
  }
}

__global__ void __launch_bounds__(kThreads)
    write_shares(const float* keys, Rows r, Counts c, Result out) {
  const uint32_t bar = c.state->bar;
  write(keys, r, out, c.above[blockIdx.x], c.ties[blockIdx.x], c.state->rank,
        [&](int64_t, uint32_t o) { return o > bar ? 1 : (o == bar ? 2 : 0); });
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  *out.flags = int32_t(c.state->flags);
  if (r.k == r.rows) *out.threshold = unorder(0);
}

// ---------------------------------------------------------------------------------------- the host

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Stream {  // launches until one fails
 public:
  explicit Stream(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}
  cudaError_t error() const { return error_; }
  void zero(void* data, size_t bytes) {
    if (error_ == cudaSuccess) error_ = cudaMemsetAsync(data, 0, bytes, stream_);
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream_;
    if (error_ == cudaSuccess) error_ = cudaLaunchKernelEx(&config, kernel, arguments...);
  }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

cudaError_t run(bool make, const Source& source, int64_t rows, int64_t k, Partial partial,
                const Result& out, void* workspace, void* stream) {
  Stream on(stream);
  const bool small = rows <= kSmall;
  int64_t shares = small ? kWarps : (rows < kShares * 4096 ? ceil_div(rows, 4096) : kShares);
  int64_t span = ceil_div(ceil_div(rows, shares), 32) * 32;
  if (span < kThreads) span = kThreads;
  shares = rows > span ? ceil_div(rows, span) : 1;
  const Rows r = {rows, k, span};
  if (small) {
    auto* codes = static_cast<uint64_t*>(workspace);
    auto* starts = reinterpret_cast<uint16_t*>(codes + rows);
    auto* flags = reinterpret_cast<int32_t*>(starts + kWarps * kBins);
    const Buckets buckets = {codes, starts, flags, unsigned(shares)};
    if (make) partial = {flags, shares};
    on.launch(make ? sort_shares<true> : sort_shares<false>, shares, source, r, buckets);
    on.launch(choose_rows, shares, source.keys, r, buckets, partial, out);
  } else {
    auto* state = static_cast<State*>(workspace);
    auto* counts = reinterpret_cast<uint32_t*>(state + 1);
    const Counts c = {state, counts, counts + kShares};
    on.zero(state, sizeof(State));
    on.launch(make ? count_digit<0, true> : count_digit<0, false>, shares, source, r, partial, c);
    on.launch(count_digit<1, false>, shares, source, r, partial, c);
    on.launch(count_digit<2, false>, shares, source, r, partial, c);
    on.launch(count_shares, shares, source.keys, r, c);
    on.launch(write_shares, shares, source.keys, r, c, out);
  }
  return on.error();
}

const char* run_on(int device, bool make, const Source& source, int64_t rows, int64_t k,
                   const Partial& partial, const Result& out, void* workspace, void* stream) {
  if (rows > kMaxRows) return "more than 2^31 - 1 rows";
  int before = device;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = run(make, source, rows, k, partial, out, workspace, stream);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // leave no error behind for the next caller
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gpu

using namespace gpu;

int64_t topk_cuda_workspace(int64_t rows) {
  if (rows > kSmall) return sizeof(State) + 2 * kShares * sizeof(uint32_t);
  return rows * int64_t(sizeof(uint64_t)) + kWarps * (kBins * 2 + 4);
}

const char* topk_cuda(const float* keys, int64_t rows, int64_t k, const int32_t* partial,
                      int64_t partials, int64_t* indices, float* threshold, int32_t* flags,
                      void* workspace, int device, void* stream) {
  Source source = {};
  source.keys = const_cast<float*>(keys);
  return run_on(device, false, source, rows, k, {partial, partials}, {indices, threshold, flags},
                workspace, stream);
}

const char* select_cuda(const Operand& online, const Operand& reference, const int64_t* seed,
                        const int64_t* step, const float* temperature, int64_t offset, int64_t rows,
                        int64_t k, float* scores, float* keys, int64_t* indices, float* threshold,
                        int32_t* flags, void* workspace, int device, void* stream) {
  const Source source = {online, reference, seed, step, temperature, offset, scores, keys};
  return run_on(device, true, source, rows, k, {nullptr, 0}, {indices, threshold, flags}, workspace,
                stream);
}

}  // namespace activesel
