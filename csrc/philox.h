// Philox 4x32 with 10 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11).
//
//   round:  (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
//   key:    (k0, k1) -> (k0 + W0, k1 + W1) between rounds
//
// The output is a pure function of counter and key, so any thread of any device draws the same word for the same cell.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MMFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMFAST_HOST_DEVICE inline
#endif

namespace mmfast {

struct Words4 {
  uint32_t word[4];
};

MMFAST_HOST_DEVICE Words4 philox4x32_10(Words4 counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The keys of cells 4*group .. 4*group+3. slot_field: 0 for a tube mask, slot + 1 where every slot is drawn on its own.
MMFAST_HOST_DEVICE Words4 cell_keys(uint64_t seed, int64_t clip, int32_t view, int32_t slot_field, uint32_t group) {
  const uint64_t id = static_cast<uint64_t>(clip);
  const uint32_t place = static_cast<uint32_t>(view) | (static_cast<uint32_t>(slot_field) << 16);
  const Words4 counter{{group, place, static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace mmfast
