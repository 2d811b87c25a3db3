// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al., SC 2011): random words from a counter and a key, nothing
// remembered.
#pragma once
#include <cstdint>

// One source for the host and the device. `static` keeps every instruction set's copy to itself.
#if defined(__CUDACC__)
#define ACTIVESEL_FN static __host__ __device__ __forceinline__
#else
#define ACTIVESEL_FN static inline __attribute__((always_inline))
#endif

namespace activesel {

struct Words {
  uint32_t w[4];
};

ACTIVESEL_FN Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                          uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57} * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The block that serves rows 4 * block .. 4 * block + 3.
ACTIVESEL_FN Words row_words(uint64_t block, uint32_t step, uint32_t chunk, uint64_t seed) {
  return philox(uint32_t(block), uint32_t(block >> 32), step, chunk, uint32_t(seed),
                uint32_t(seed >> 32));
}

}  // namespace activesel
