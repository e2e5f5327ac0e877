// Runs every host routine of csrc once under callgrind, which writes how many instructions each took (perf_native.py).
// One thread, vector registers of one width, fixed sizes: the counts depend on the compiler and on nothing else.
#include <valgrind/callgrind.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "attention.h"
#include "gather.h"
#include "int8.h"
#include "pack.h"
#include "sampler.h"
#include "ted.h"

namespace {

constexpr int kWidest = 32;  // valgrind knows no wider registers

// `name` ends up in the dump. The first run is not counted: it binds symbols and touches memory.
#define COUNTED(name, call)        \
  do {                             \
    call;                          \
    CALLGRIND_ZERO_STATS;          \
    call;                          \
    CALLGRIND_DUMP_STATS_AT(name); \
  } while (false)

std::vector<float> drawn(int64_t count, int64_t seed) {
  std::vector<float> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = static_cast<float>((i * 7919 + seed * 104729) % 41 - 20) / 16.0f;
  return made;
}

void gathers() {
  const int64_t size[5] = {2, 3, 4, 64, 64};  // 2 x 4 x 4 tokens a clip
  std::vector<uint8_t> pixels(2 * 3 * 4 * 64 * 64);
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<uint8_t>(i * 31 % 251);
  std::vector<int32_t> token, clip;
  for (int32_t i = 0; i < 96; ++i) {
    token.push_back(i * 5 % 32);
    clip.push_back(i % 2);
  }
  const mmfast::Tubes tubes{token.data(), clip.data(), 96, 2, 16};
  mmfast::Video planes{pixels.data(), mmfast::Pixel::u8, {}, {49152, 16384, 4096, 64, 1}};
  mmfast::Video decoded{pixels.data(), mmfast::Pixel::u8, {}, {49152, 1, 12288, 192, 3}};
  std::memcpy(planes.size, size, sizeof size);
  std::memcpy(decoded.size, size, sizeof size);
  const float scale[3] = {0.5f, 0.25f, 0.125f}, shift[3] = {-1.0f, 0.0f, 1.0f};
  std::vector<uint8_t> bytes(96 * 1536);
  std::vector<float> floats(96 * 1536);
  const mmfast::Rows to_bytes{bytes.data(), mmfast::Pixel::u8, nullptr, nullptr};
  const mmfast::Rows to_floats{floats.data(), mmfast::Pixel::f32, scale, shift};
  COUNTED("gather_tubes, planes to bytes", mmfast::gather_tubes(planes, tubes, to_bytes, 1));
  COUNTED("gather_tubes, planes to normalised floats", mmfast::gather_tubes(planes, tubes, to_floats, 1));
  COUNTED("gather_tubes, as decoded to bytes", mmfast::gather_tubes(decoded, tubes, to_bytes, 1));
}

void attentions() {
  const int64_t sequences = 2, n = 98, heads = 2, d = 64, tokens = sequences * n, row = heads * d;
  const std::vector<float> qkv = drawn(tokens * 3 * row, 1), dout = drawn(tokens * row, 2);
  std::vector<float> out(tokens * row), lse(heads * tokens), dqkv(tokens * 3 * row);
  const auto of = [&](int64_t which) { return mmfast::Heads{qkv.data() + which * row, tokens, 3 * row, d}; };
  const auto to = [&](int64_t which) { return mmfast::HeadsOf<float>{dqkv.data() + which * row, tokens, 3 * row, d}; };
  const mmfast::Bounds each{nullptr, n};
  const mmfast::Attention job{of(0), of(1), of(2), each, each, sequences, heads, d, false, 0.125f};
  COUNTED("attention", mmfast::attention(job, out.data(), lse.data(), 1, kWidest));
  const mmfast::AttentionGrads grads{dout.data(), out.data(), lse.data(), to(0), to(1), to(2)};
  COUNTED("attention_backward", mmfast::attention_backward(job, grads, 1, kWidest));
}

// One view of 4 x 4 cells, all kept.
void stencils() {
  std::vector<int32_t> table;
  for (int32_t cell = 0; cell < 16; ++cell) {
    for (int32_t dy = -1; dy <= 1; ++dy) {
      for (int32_t dx = -1; dx <= 1; ++dx) {
        const int32_t y = cell / 4 + dy, x = cell % 4 + dx;
        table.push_back(y >= 0 && y < 4 && x >= 0 && x < 4 ? dy * 4 + dx : mmfast::kNoSite);
      }
    }
    for (const int32_t word : {cell, 16, 0}) table.push_back(word);
  }
  const mmfast::TedSites sites{table.data(), 16, 4, 16};
  const int64_t wide = 96, size = sites.rows() * 2 * wide;
  const std::vector<float> taps[6] = {drawn(wide, 1), drawn(3 * wide, 2), drawn(wide, 3),
                                      drawn(wide, 4), drawn(9 * wide, 5), drawn(wide, 6)};
  const mmfast::TedParameters parameters{wide,           wide,           taps[0].data(), taps[1].data(),
                                         taps[2].data(), taps[3].data(), taps[4].data(), taps[5].data()};
  const std::vector<float> h = drawn(size, 7), dout = drawn(size, 8);
  std::vector<float> out(size), sums[6];
  for (int k = 0; k < 6; ++k) sums[k].resize(taps[k].size());
  const mmfast::TedGradients gradients{sums[0].data(), sums[1].data(), sums[2].data(),
                                       sums[3].data(), sums[4].data(), sums[5].data()};
  COUNTED("ted_stencil", mmfast::ted_stencil(h.data(), sites, parameters, out.data(), 1, kWidest));
  COUNTED("ted_stencil_backward",
          mmfast::ted_stencil_backward(dout.data(), h.data(), sites, parameters, out.data(), gradients, 1, kWidest));
}

void int8_passes() {
  const int64_t rows = 24, width = 384;
  std::vector<int32_t> product(rows * width);
  for (int64_t i = 0; i < rows * width; ++i) product[i] = static_cast<int32_t>(i * 7919 % 4001 - 2000);
  const std::vector<float> row_scale(rows, 0.01f), scale(width, 0.05f), vector = drawn(width, 1);
  std::vector<float> stream = drawn(rows * width, 2), out_scale(rows);
  std::vector<int8_t> out(rows * width);
  mmfast::Int8Pass pass{rows,          width,   product.data(), row_scale.data(), scale.data(),
                        vector.data(), nullptr, nullptr,        nullptr,          mmfast::Gelu::erf,
                        nullptr,       nullptr, 1e-6f,          out.data(),       out_scale.data()};
  COUNTED("int8_pass, GELU", mmfast::int8_pass(pass, 1, kWidest));
  pass.gelu = mmfast::Gelu::none;
  pass.residual = stream.data();
  pass.total = stream.data();
  pass.norm_weight = pass.norm_bias = vector.data();
  COUNTED("int8_pass, residual and norm", mmfast::int8_pass(pass, 1, kWidest));
}

void samples() {
  const std::vector<int64_t> clips{3, 5, 7, 11};
  std::vector<int32_t> kept(4 * 2 * 8 * 49);
  const mmfast::MaskDraw draw{4, 2, 8, 196, 49, 1, false};
  COUNTED("sample_keep", mmfast::sample_keep(clips.data(), draw, kept.data(), 1));
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::fputs("the counts are of AVX2 and FMA, which this processor does not have\n", stderr);
    return 77;
  }
  gathers();
  attentions();
  stencils();
  int8_passes();
  samples();
  std::fflush(stdout);
  return 0;
}
