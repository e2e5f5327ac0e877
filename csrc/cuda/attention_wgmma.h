// Softmax attention of sequences of one length by Hopper's warpgroup products: fp16 or bf16, heads 64 wide, 1 to
// kMaxWgmmaKeys keys. kernels/mmfast_kernels/attention_wgmma.py has the equations.
#pragma once

#include <cstdint>

namespace mmfast {

constexpr int64_t kMaxWgmmaKeys = 400;

struct WgmmaRows {
  const void* data;   // [rows, heads, 64], 16-byte aligned
  int64_t row, head;  // strides in elements, multiples of 8
};

struct WgmmaAttention {
  WgmmaRows q, k, v;
  int64_t sequences, heads, n_q, n_k;  // queries and keys of every sequence
  float scale;
  bool bf16;  // else fp16
};

// out [sequences * n_q, heads, 64] contiguous; lse [heads, sequences * n_q] or null. std::runtime_error unless the
// current device is of compute capability 9.0.
void attention_wgmma_cuda(const WgmmaAttention& job, void* out, float* lse, void* stream);

}  // namespace mmfast
