// Softmax attention inside each sequence of a pack: fp32, forward only.
#pragma once

#include <cstdint>

namespace mmfast {

// One of q, k, v: the d neighbouring elements of token t and head h begin at data + t*token_stride + h*head_stride.
struct Heads {
  const float* data;
  int64_t tokens, token_stride, head_stride;
};

// Where the sequences begin, among queries or among keys.
struct Bounds {
  const int32_t* starts;  // [sequences + 1], or null: every sequence has `length` tokens
  int64_t length;
};

struct Attention {
  Heads q, k, v;
  Bounds of_q, of_k;
  int64_t sequences, heads;
  int64_t d;    // a multiple of 16, up to 128
  bool causal;  // query i sees the keys up to i + (keys - queries) of its sequence
  float scale;  // above 0
};

// out: [tokens of q, heads, d]; 0 for a query that sees no key, untouched behind the last sequence. The values do not
// depend on `threads`. widest: the most bytes a vector register may have (16, 32, 64; the processor's own limit holds
// as well). Throws std::invalid_argument, before it writes, for starts that do not ascend within the tokens.
void attention(const Attention& job, float* out, int threads, int widest = 64);

}  // namespace mmfast
