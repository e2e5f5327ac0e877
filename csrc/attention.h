// Softmax attention inside each sequence of a pack, and its backward: fp32.
#pragma once

#include <cstdint>

namespace mmfast {

// One of q, k, v or their gradients: the d neighbouring elements of token t and head h begin at
// data + t*token_stride + h*head_stride.
template <class Float>
struct HeadsOf {
  Float* data;
  int64_t tokens, token_stride, head_stride;

  Float* at(int64_t token, int64_t head) const {
    return data ? data + token * token_stride + head * head_stride : nullptr;
  }
};
using Heads = HeadsOf<const float>;

// Where the sequences begin, among queries or among keys.
struct Bounds {
  const int32_t* starts;  // [sequences + 1], or null: every sequence has `length` tokens
  int64_t length;

  int64_t start(int64_t s) const { return starts ? starts[s] : s * length; }
};

struct Attention {
  Heads q, k, v;
  Bounds of_q, of_k;
  int64_t sequences, heads;
  int64_t d;    // a multiple of 16, up to 128
  bool causal;  // query i sees the keys up to i + (keys - queries) of its sequence
  float scale;  // above 0
};

struct AttentionGrads {
  const float *dout, *out;  // [tokens of q, heads, d]
  const float* lse;         // [heads, tokens of q]
  HeadsOf<float> dq, dk, dv;
};

// out: [tokens of q, heads, d]; 0 for a query that sees no key, untouched behind the last sequence. lse, if not null:
// [heads, tokens of q], the natural logarithm of the sum of exponentials; -inf for a query that sees no key. The values
// do not depend on `threads`. widest: the most bytes a vector register may have (16, 32, 64; the processor's own limit
// holds as well). Throws std::invalid_argument, before it writes, for starts that do not ascend within the tokens.
void attention(const Attention& job, float* out, float* lse, int threads, int widest = 64);

// From dout, and what attention() gave, the gradients of q, k and v; 0 behind the last sequence. The rest as above.
void attention_backward(const Attention& job, const AttentionGrads& grads, int threads, int widest = 64);

// The check that both begin with.
void check_attention(const Attention& job);

}  // namespace mmfast
