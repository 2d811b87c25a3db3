// SPDX-License-Identifier: Apache-2.0
// The CPU side of launch.h: picks the instruction set, shares rows among threads, finds the top k.
#include <algorithm>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "gumbel.h"
#include "kernels_cpu.h"

namespace activesel {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool usable;
};

const std::vector<Isa>& isas() {  // best first
  static const std::vector<Isa> all = {
#ifdef ACTIVESEL_X86
      {"avx512", &avx512::kernels,
       bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))},
      {"avx2", &avx2::kernels,
       bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))},
#endif
      {"baseline", &baseline::kernels, true},
  };
  return all;
}

const Isa*& current() {
  static const Isa* isa =
      &*std::find_if(isas().begin(), isas().end(), [](const Isa& i) { return i.usable; });
  return isa;
}

const Kernels& kernels() { return *current()->kernels; }

// Contiguous shares of [0, rows), one per thread, as many as are worth starting.
class Shares {
 public:
  // `cost` is in nanoseconds per row; a thread should have 100 us to do.
  Shares(int64_t rows, double cost, int threads) : rows_(rows) {
    const double useful = double(rows) * cost / 100e3;
    count_ = int(std::clamp(useful, 1.0, double(std::max(threads, 1))));
  }
  int count() const { return count_; }
  int64_t begin(int share) const {
    return rows_ / count_ * share + std::min<int64_t>(share, rows_ % count_);
  }

  template <class Work>  // work(share, begin, end)
  void run(const Work& work) const {
    std::vector<std::thread> others;
    int share = 1;
    try {
      for (; share < count_; ++share)
        others.emplace_back([&work, this, share] { work(share, begin(share), begin(share + 1)); });
    } catch (const std::system_error&) {  // no more threads to be had: do the rest here
      for (; share < count_; ++share) work(share, begin(share), begin(share + 1));
    }
    work(0, begin(0), begin(1));
    for (std::thread& other : others) other.join();
  }

 private:
  int64_t rows_;
  int count_;
};

double cost_of(const Operand& side, int64_t tokens) {
  return side.kind == Kind::logits ? double(tokens) * (50 + 0.2 * double(side.classes)) : 1.0;
}

constexpr double kNoiseCost = 3.0, kCountCost = 0.5;  // of one pass

// The key of the `skip`-th row at `o`: both zeros share an order, and the sign is kept.
float key_at(const float* keys, int64_t rows, uint32_t o, int64_t skip) {
  if (o != order(0.0f)) return unorder(o);
  int64_t i = 0;
  while (i < rows && (order(keys[i]) != o || skip-- > 0)) ++i;
  return keys[i];
}

}  // namespace

const char* isa() { return current()->name; }

bool set_isa(const char* name) {
  for (const Isa& i : isas())
    if (i.usable && std::strcmp(i.name, name) == 0) {
      current() = &i;
      return true;
    }
  return false;
}

void noise_cpu(Noise noise, int64_t rows, float* out, int threads) {
  Shares(rows, kNoiseCost, threads).run([&](int, int64_t begin, int64_t end) {
    kernels().noise(noise, begin, end, out);
  });
}

int score_cpu(const Operand& online, const Operand& reference, const Targets& targets, Loss loss,
              int64_t rows, int64_t tokens, float* scores, int threads) {
  const ScoreJob job = {online, reference, targets, loss, tokens};
  const Shares shares(rows, cost_of(online, tokens) + cost_of(reference, tokens), threads);
  std::vector<int> flags(size_t(shares.count()));
  shares.run([&](int share, int64_t begin, int64_t end) {
    flags[size_t(share)] = kernels().scores(job, begin, end, scores);
  });
  int all = 0;
  for (int f : flags) all |= f;
  return all;
}

// Radix selection on the ordered keys: each pass counts the next digit among the rows that still
// share the k-th key's leading digits. Whatever the keys, that is a few reads of each. What comes
// out is a bar: chosen are the rows above it, and the first `wanted` of those at it.
int topk_cpu(const float* keys, int64_t rows, int64_t k, int64_t* indices, float* threshold,
             int threads) {
  const int width = rows < 4096 ? 8 : kMaxDigit;
  const Shares shares(rows, kCountCost, threads);
  const size_t parts = size_t(shares.count()), digits = size_t{1} << width;
  std::vector<int64_t> counts(parts * digits), above(parts), equal(parts);
  uint32_t bar = 0xFFFFFFFF, mask = 0;  // above every order
  int64_t wanted = k;                   // rows still to be found among those that share `bar`
  if (k > 0) bar = 0;
  for (int left = 32; k > 0 && left > 0;) {
    const int bits = std::min(width, left), shift = left - bits;
    shares.run([&](int share, int64_t begin, int64_t end) {
      kernels().count(keys, begin, end, mask, bar, shift, bits, &counts[size_t(share) * digits]);
    });
    uint32_t digit = (1u << bits) - 1;
    int64_t here = 0;
    for (;; --digit, wanted -= here) {
      here = 0;
      for (size_t p = 0; p < parts; ++p) {
        above[p] += equal[p];
        here += equal[p] = counts[p * digits + digit];
      }
      if (here >= wanted) break;
    }
    bar |= digit << shift;
    mask |= ((1u << bits) - 1) << shift;
    left = shift;
    if (here == wanted && shift > 0 && bar > 0) {  // the whole bucket: other digits do not matter
      for (size_t p = 0; p < parts; ++p) above[p] += equal[p];
      std::fill(equal.begin(), equal.end(), 0);
      wanted = 0;
      --bar;
      break;
    }
    if (left > 0) std::fill(equal.begin(), equal.end(), 0);
  }
  // Each share knows how many rows it has above the bar, and how many of the ties come before it.
  std::vector<int64_t> start(parts), ties(parts);
  std::vector<uint32_t> left_out(parts);
  int64_t ties_left = wanted, at = 0;
  for (size_t p = 0; p < parts; ++p) {
    ties[p] = std::min(ties_left, equal[p]);
    ties_left -= ties[p];
    start[p] = at;
    at += above[p] + ties[p];
  }
  shares.run([&](int share, int64_t begin, int64_t end) {
    const size_t p = size_t(share);
    left_out[p] = kernels().emit(keys, begin, end, bar, ties[p], indices + start[p]);
  });
  const uint32_t best = *std::max_element(left_out.begin(), left_out.end());
  *threshold = key_at(keys, rows, best, best == bar ? wanted : 0);
  return k > 0 && bar == 0 ? kTooFewRows : 0;
}

int select_cpu(const Operand& online, const Operand& reference, const Targets& targets, Loss loss,
               int64_t rows, int64_t tokens, Noise noise, float temperature, int64_t k,
               float* scores, float* keys, int64_t* indices, float* threshold, int threads) {
  const ScoreJob job = {online, reference, targets, loss, tokens};
  const double cost = cost_of(online, tokens) + cost_of(reference, tokens) + kNoiseCost;
  const Shares shares(rows, cost, threads);
  std::vector<int> flags(size_t(shares.count()));
  shares.run([&](int share, int64_t begin, int64_t end) {
    flags[size_t(share)] = kernels().scores(job, begin, end, scores) |
                           kernels().keys(scores, noise, temperature, begin, end, keys);
  });
  int all = topk_cpu(keys, rows, k, indices, threshold, threads);
  for (int f : flags) all |= f;
  return all;
}

void joint_cpu(const JointJob& job, int threads) {
  const int64_t columns = kernels().joint_columns, tile = kernels().joint_rows;
  const int64_t padded = (job.chosen + columns - 1) / columns * columns;
  const int64_t widths[2] = {job.side[0].width, job.side[1].width};
  const int64_t widest = std::max(widths[0], widths[1]);
  std::vector<float> chunks(size_t(2 * padded * (widths[0] + widths[1])));
  const float* packed[4];
  int64_t start = 0;
  for (int way = 0; way < 4; ++way) {
    const PairSide& side = job.side[way / 2];
    packed[way] = chunks.data() + start;
    if (side.width > 0)
      kernels().joint_pack(side.matrix[1 - way % 2], side.width, job.chunk, job.chosen,
                           chunks.data() + start);
    start += padded * side.width;
  }
  const double cost = 0.035 * double(job.chosen) * double(widths[0] + widths[1]);
  const Shares shares(job.count, cost, threads);
  std::vector<float> scratch(size_t(shares.count() * tile * widest));
  shares.run([&](int share, int64_t begin, int64_t end) {
    kernels().joint(job, packed, begin, end, scratch.data() + share * tile * widest);
  });
}

}  // namespace activesel
