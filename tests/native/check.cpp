// Drives every host routine of csrc on buffers of exactly the right size, for the sanitizers (tests/sanitize.py). What
// the routines compute is compared with plain loops; that they stay in their buffers and do not race is the sanitizers'
// part.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "attention.h"
#include "gather.h"
#include "int8.h"
#include "pack.h"
#include "sampler.h"
#include "ted.h"
#include "threads.h"

namespace {

#define EXPECT(condition)                                                          \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

template <class Call>
bool refuses(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

std::vector<int32_t> sample(std::vector<int64_t> clips, int32_t views, int32_t slots, int32_t cells, int32_t keep,
                            uint64_t seed, bool per_slot, int threads) {
  std::vector<int32_t> out(clips.size() * views * slots * keep);
  const mmfast::MaskDraw draw{static_cast<int64_t>(clips.size()), views, slots, cells, keep, seed, per_slot};
  mmfast::sample_keep(clips.data(), draw, out.data(), threads);
  return out;
}

void check_sampler() {
  const std::vector<int64_t> clips{0, -1, int64_t{1} << 62, 7};
  for (const bool per_slot : {false, true}) {
    for (const int32_t cells : {1, 3, 196, 5000}) {
      for (const int32_t keep : {0, 1, cells / 2, cells}) {
        const auto one = sample(clips, 3, 2, cells, keep, ~uint64_t{0}, per_slot, 1);
        EXPECT(one == sample(clips, 3, 2, cells, keep, ~uint64_t{0}, per_slot, 4));
        for (size_t i = 0; i < one.size(); ++i) {
          EXPECT(one[i] >= 0 && one[i] < 2 * cells);
          EXPECT(i % (2 * size_t(keep)) == 0 || one[i] > one[i - 1]);
        }
      }
    }
  }
  EXPECT(sample({}, 3, 2, 4, 2, 0, false, 4).empty());
  EXPECT(sample({1}, 0, 2, 4, 2, 0, false, 4).empty());
}

// clip sizes in patches; a tight buffer in the given order of axes, so that one read too many is one too far.
template <class In, class Out>
void check_gather(int64_t channels, int32_t tubelet, int32_t patch, bool last, bool affine, int threads) {
  const int64_t size[5] = {2, channels, 2 * tubelet, 3 * patch, 2 * patch};
  const int order_planes[5] = {0, 1, 2, 3, 4}, order_last[5] = {0, 2, 3, 4, 1};
  mmfast::Video video{nullptr, sizeof(In) == 1 ? mmfast::Pixel::u8 : mmfast::Pixel::f32, {}, {}};
  int64_t total = 1;
  for (int k = 4; k >= 0; --k) {
    const int axis = last ? order_last[k] : order_planes[k];
    video.size[axis] = size[axis];
    video.stride[axis] = total;
    total *= size[axis];
  }
  std::vector<In> pixels(total);
  for (int64_t i = 0; i < total; ++i) pixels[i] = static_cast<In>(i * 31 % 251);
  video.data = pixels.data();
  std::vector<int32_t> token, clip;
  for (int32_t id = 0; id < 12; ++id) {
    token.push_back((id * 5) % 12);
    clip.push_back(id % 2);
  }
  std::vector<float> scale(channels, 0.5f), shift(channels, -1.0f);
  const int64_t row_size = channels * tubelet * patch * patch;
  std::vector<Out> rows(token.size() * row_size);
  const mmfast::Tubes tubes{token.data(), clip.data(), static_cast<int64_t>(token.size()), tubelet, patch};
  const mmfast::Rows out{rows.data(), sizeof(Out) == 1 ? mmfast::Pixel::u8 : mmfast::Pixel::f32,
                         affine ? scale.data() : nullptr, affine ? shift.data() : nullptr};
  mmfast::gather_tubes(video, tubes, out, threads);
  size_t k = 0;
  for (size_t i = 0; i < token.size(); ++i) {
    const int64_t slot = token[i] / 6, y = token[i] / 2 % 3, x = token[i] % 2;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t dt = 0; dt < tubelet; ++dt) {
        for (int64_t dy = 0; dy < patch; ++dy) {
          for (int64_t dx = 0; dx < patch; ++dx, ++k) {
            const In pixel =
                pixels[clip[i] * video.stride[0] + c * video.stride[1] + (slot * tubelet + dt) * video.stride[2] +
                       (y * patch + dy) * video.stride[3] + (x * patch + dx) * video.stride[4]];
            EXPECT(rows[k] == static_cast<Out>(affine ? pixel * 0.5f - 1.0f : static_cast<float>(pixel)));
          }
        }
      }
    }
  }
  token[3] = 12;
  EXPECT(refuses([&] { mmfast::gather_tubes(video, tubes, out, threads); }));
  token[3] = 0;
  clip[5] = -1;
  EXPECT(refuses([&] { mmfast::gather_tubes(video, tubes, out, threads); }));
}

void check_gathers() {
  for (const int64_t channels : {1, 2, 3, 21}) {
    for (const int32_t patch : {1, 4, 5, 14, 16}) {
      for (const bool last : {false, true}) {
        for (const int threads : {1, 3}) {
          check_gather<uint8_t, uint8_t>(channels, 2, patch, last, false, threads);
          check_gather<uint8_t, float>(channels, 1, patch, last, false, threads);
          check_gather<uint8_t, float>(channels, 2, patch, last, true, threads);
          check_gather<float, float>(channels, 2, patch, last, false, threads);
          check_gather<float, float>(channels, 1, patch, last, true, threads);
        }
      }
    }
  }
}

void check_union() {
  const std::vector<int32_t> keep{0, 2, 5, 1, 2, 9, 4, 4}, bounds{0, 3, 6, 7, 8};
  std::vector<int32_t> ids(keep.size()), clips(keep.size()), row_of(keep.size());
  const int64_t rows = mmfast::union_rows(keep.data(), 8, bounds.data(), 4, 2, ids.data(), clips.data(), row_of.data());
  ids.resize(rows);
  clips.resize(rows);
  EXPECT((ids == std::vector<int32_t>{0, 1, 2, 5, 9, 4}));
  EXPECT((clips == std::vector<int32_t>{0, 0, 0, 0, 0, 1}));
  EXPECT((row_of == std::vector<int32_t>{0, 2, 3, 1, 2, 4, 5, 5}));
  using Bounds = std::vector<int32_t>;
  const auto refused = [&](const std::vector<int32_t>& tokens, const Bounds& wrong) {
    return refuses([&] {
      mmfast::union_rows(tokens.data(), tokens.size(), wrong.data(), wrong.size() - 1, 2, ids.data(), clips.data(),
                         row_of.data());
    });
  };
  for (const Bounds& wrong : {Bounds{0, 3, 6, 7, 9}, {0, 3, 2, 7, 8}, {1, 3, 6, 7, 8}, {0, 4, 6, 7, 8}}) {
    EXPECT(refused(keep, wrong));
  }
  EXPECT(refused({1, 2, 3, 4}, {0, 9, 4}));
}

// Values of a wave, in rows of `row` with the same number of NaNs behind each but the last.
std::vector<float> wave(int64_t rows, int64_t row, int step, int period) {
  std::vector<float> x(rows ? (2 * rows - 1) * row : 0, NAN);
  for (int64_t i = 0; i < rows * row; ++i) {
    x[i / row * 2 * row + i % row] = static_cast<float>(i * step % period) / 32.0f - 1.0f;
  }
  return x;
}

// Sequences of the given lengths; all but dout and out with as much space between tokens as a token takes.
void check_attention(const std::vector<int32_t>& of_q, const std::vector<int32_t>& of_k, int64_t d, bool causal,
                     int threads, int widest) {
  constexpr int64_t kHeads = 2;
  constexpr double kScale = 0.25;
  const int64_t behind = causal ? 1 : 0;  // tokens behind the last sequence
  const int64_t row = kHeads * d, n_q = of_q.back() + behind, n_k = of_k.back() + behind;
  const auto q = wave(n_q, row, 37, 64), k = wave(n_k, row, 53, 61), v = wave(n_k, row, 29, 67);
  std::vector<float> dout(n_q * row, NAN), out(n_q * row, NAN), lse(kHeads * n_q, NAN);
  for (int64_t i = 0; i < of_q.back() * row; ++i) dout[i] = static_cast<float>(i * 41 % 59) / 32.0f - 1.0f;
  const int64_t sequences = static_cast<int64_t>(of_q.size()) - 1;
  mmfast::Attention job{{q.data(), n_q, 2 * row, d},
                        {k.data(), n_k, 2 * row, d},
                        {v.data(), n_k, 2 * row, d},
                        {of_q.data(), 0},
                        {of_k.data(), 0},
                        sequences,
                        kHeads,
                        d,
                        causal,
                        static_cast<float>(kScale)};
  std::vector<float> dq(q.size(), NAN), dk(k.size(), NAN), dv(v.size(), NAN);
  const mmfast::AttentionGrads grads{dout.data(),
                                     out.data(),
                                     lse.data(),
                                     {dq.data(), n_q, 2 * row, d},
                                     {dk.data(), n_k, 2 * row, d},
                                     {dv.data(), n_k, 2 * row, d}};
  mmfast::attention(job, out.data(), lse.data(), threads, widest);
  mmfast::attention_backward(job, grads, threads, widest);
  std::vector<double> true_dq(dq.size(), 0.0), true_dk(dk.size(), 0.0), true_dv(dv.size(), 0.0);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t shift = int64_t{of_k[s + 1]} - of_k[s] - (of_q[s + 1] - of_q[s]);
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t i = of_q[s]; i < of_q[s + 1]; ++i) {
        const int64_t end = causal ? std::min<int64_t>(of_k[s + 1], of_k[s] + i - of_q[s] + shift + 1) : of_k[s + 1];
        const int64_t at_q = i * 2 * row + h * d, at_out = i * row + h * d;
        std::vector<double> sum(d, 0.0), p, dp;
        double weight = 0.0, delta = 0.0;
        for (int64_t j = of_k[s]; j < end; ++j) {
          const int64_t at_k = j * 2 * row + h * d;
          double score = 0.0, product = 0.0;
          for (int64_t e = 0; e < d; ++e) {
            score += double{q[at_q + e]} * k[at_k + e];
            product += double{dout[at_out + e]} * v[at_k + e];
          }
          p.push_back(std::exp(kScale * score));
          dp.push_back(product);
          weight += p.back();
          delta += p.back() * product;
          for (int64_t e = 0; e < d; ++e) sum[e] += p.back() * v[at_k + e];
        }
        EXPECT(weight > 0.0 ? std::abs(lse[h * n_q + i] - std::log(weight)) < 1e-5 : lse[h * n_q + i] == -INFINITY);
        for (int64_t e = 0; e < d; ++e) {
          EXPECT(std::abs(out[at_out + e] - (weight > 0.0 ? sum[e] / weight : 0.0)) < 1e-5);
        }
        for (int64_t j = of_k[s]; j < end; ++j) {
          const int64_t at_k = j * 2 * row + h * d;
          const double share = p[j - of_k[s]] / weight, ds = kScale * share * (dp[j - of_k[s]] - delta / weight);
          for (int64_t e = 0; e < d; ++e) {
            true_dq[at_q + e] += ds * k[at_k + e];
            true_dk[at_k + e] += ds * q[at_q + e];
            true_dv[at_k + e] += share * dout[at_out + e];
          }
        }
      }
    }
  }
  const auto same = [&](const std::vector<float>& got, const std::vector<double>& expected) {
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT(i / row % 2 ? std::isnan(got[i]) : std::abs(got[i] - expected[i]) < 1e-4);
    }
  };
  same(dq, true_dq);
  same(dk, true_dk);
  same(dv, true_dv);
  job.of_k.starts = nullptr;
  job.of_k.length = n_k + 1;
  EXPECT(sequences == 0 || refuses([&] { mmfast::attention(job, out.data(), nullptr, threads, widest); }));
  EXPECT(sequences == 0 || refuses([&] { mmfast::attention_backward(job, grads, threads, widest); }));
}

void check_attentions() {
  for (const int widest : {16, 32, 64}) {
    for (const int threads : {1, 3}) {
      for (const bool causal : {false, true}) {
        check_attention({0, 1, 1, 50, 67}, {0, 1, 1, 50, 67}, 16, causal, threads, widest);
        check_attention({0, 49, 97}, {0, 3, 520}, 48, causal, threads, widest);
        check_attention({0, 20, 21}, {0, 0, 17}, 128, causal, threads, widest);
        check_attention({0, 101}, {0, 0}, 32, causal, threads, widest);
        check_attention({0, 0}, {0, 7}, 32, causal, threads, widest);
      }
    }
  }
  check_attention({0}, {0}, 16, false, 2, 64);
}

void check_threads() {
  for (const int64_t count : {0, 1, 7, 100}) {
    for (const int threads : {0, 1, 3, 200}) {
      std::vector<int> seen(count);
      mmfast::parallel_for(count, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++seen[i];
      });
      EXPECT(seen == std::vector<int>(count, 1));
    }
  }
}

// A view of a class token and three cells in a row, then one of a single cell.
void check_ted(int64_t copies, int64_t frames, int64_t time_width, int64_t space_width, int threads, int widest) {
  const int32_t none = mmfast::kNoSite;
  std::vector<int32_t> table;
  for (int32_t i = 0; i < 5; ++i) {
    std::vector<int32_t> site(mmfast::kSiteWords, none);
    const bool cell = i > 0;
    if (cell) site[4] = 0;
    if (i == 2 || i == 3) site[3] = -1;
    if (i == 1 || i == 2) site[5] = 1;
    site[mmfast::kSiteFirst] = i < 4 ? i : static_cast<int32_t>(4 * frames);
    site[mmfast::kSiteStep] = i < 4 ? 4 : 1;
    table.insert(table.end(), site.begin(), site.end());
  }
  const mmfast::TedSites sites{table.data(), 5, frames, copies};
  const int64_t width = time_width + space_width, size = sites.rows() * width;
  const auto draw = [](int64_t count, int64_t seed) {
    std::vector<float> made(count);
    for (int64_t i = 0; i < count; ++i) made[i] = static_cast<float>((i * 7919 + seed * 104729) % 41 - 20) / 16.0f;
    return made;
  };
  const std::vector<float> shift = draw(time_width, 1), taps = draw(3 * time_width, 2), bias = draw(time_width, 3);
  const std::vector<float> shift_s = draw(space_width, 4), taps_s = draw(9 * space_width, 5),
                           bias_s = draw(space_width, 6);
  const mmfast::TedParameters parameters{time_width,  space_width,    shift.data(),  taps.data(),
                                         bias.data(), shift_s.data(), taps_s.data(), bias_s.data()};
  const std::vector<float> h = draw(size, 7), dout = draw(size, 8);
  std::vector<float> out(size);
  mmfast::ted_stencil(h.data(), sites, parameters, out.data(), threads, widest);
  for (int64_t row = 0; row < sites.rows(); ++row) {
    const int64_t within = row % (5 * frames), small = within >= 4 * frames, sites_here = small ? 1 : 4;
    const int64_t place = small ? 4 : within % 4, t = (small ? within - 4 * frames : within) / sites_here;
    for (int64_t c = 0; c < width; ++c) {
      const auto at = [&](int64_t away, int64_t frame) {
        return h[(row + away + (frame - t) * sites_here) * width + c];
      };
      float want = 0.0f;
      if (c < time_width) {
        want = bias[c];
        for (int64_t k = 0; k < 3; ++k) {
          const int64_t frame = t + k - 1;
          if (frame >= 0 && frame < frames) want += taps[c * 3 + k] * (at(0, frame) + shift[c]);
        }
      } else if (place > 0) {
        const int64_t s = c - time_width;
        want = bias_s[s];
        for (int64_t k = 0; k < 9; ++k) {
          const int32_t away = table[place * mmfast::kSiteWords + k];
          if (away == none) continue;
          want += taps_s[s * 9 + k] * ((t > 0 ? at(away, t) - at(away, t - 1) : 0.0f) + shift_s[s]);
        }
      }
      EXPECT(std::abs(out[row * width + c] - want) < 1e-4f);
    }
  }
  std::vector<float> in_place = h;
  mmfast::ted_stencil(in_place.data(), sites, parameters, in_place.data(), threads, widest);
  EXPECT(in_place == out);

  // The stencil is linear in h but for a constant: its gradient along any direction is a difference.
  std::vector<float> dh(size), grads[6], moved = draw(size, 9), there(size);
  const int64_t sizes[6] = {time_width, 3 * time_width, time_width, space_width, 9 * space_width, space_width};
  for (int k = 0; k < 6; ++k) grads[k].resize(sizes[k]);
  const mmfast::TedGradients to{grads[0].data(), grads[1].data(), grads[2].data(),
                                grads[3].data(), grads[4].data(), grads[5].data()};
  mmfast::ted_stencil_backward(dout.data(), h.data(), sites, parameters, dh.data(), to, threads, widest);
  double along = 0.0, difference = 0.0;
  for (int64_t i = 0; i < size; ++i) along += double(dh[i]) * moved[i];
  for (int64_t i = 0; i < size; ++i) moved[i] += h[i];
  mmfast::ted_stencil(moved.data(), sites, parameters, there.data(), threads, widest);
  for (int64_t i = 0; i < size; ++i) difference += double(dout[i]) * (double(there[i]) - out[i]);
  EXPECT(std::abs(along - difference) < 1e-3 * (size + 1));
  std::vector<float> changed = dout;
  mmfast::ted_stencil_backward(changed.data(), h.data(), sites, parameters, changed.data(), to, threads, widest);
  EXPECT(changed == dh);
  if (copies > 0) {
    table[mmfast::kSiteStep] = 9;
    EXPECT(refuses([&] { mmfast::ted_stencil(h.data(), sites, parameters, out.data(), threads, widest); }));
  }
}

void check_teds() {
  for (const int widest : {16, 32, 64}) {
    for (const int threads : {1, 3}) {
      check_ted(2, 3, 21, 37, threads, widest);
      check_ted(1, 1, 64, 16, threads, widest);
      check_ted(20, 8, 130, 70, threads, widest);
      check_ted(0, 2, 8, 8, threads, widest);
    }
  }
}

// A pass over a product with everything in it, against plain loops; then rows with NaN and infinity.
void check_int8(int64_t rows, int64_t width, mmfast::Gelu gelu, bool normed, int threads, int widest) {
  std::vector<int32_t> product(rows * width);
  std::vector<float> row_scale(rows), scale(width), bias(width), residual(rows * width), total(rows * width);
  std::vector<float> weight(width), shift(width), out_scale(rows);
  std::vector<int8_t> out(rows * width, -128);
  for (int64_t i = 0; i < rows * width; ++i) {
    product[i] = static_cast<int32_t>(i * 7919 % 4001 - 2000);
    residual[i] = static_cast<float>(i * 31 % 17 - 8) / 8.0f;
  }
  for (int64_t r = 0; r < rows; ++r) row_scale[r] = 0.01f + 0.001f * static_cast<float>(r % 7);
  for (int64_t c = 0; c < width; ++c) {
    scale[c] = 0.05f + 0.01f * static_cast<float>(c % 5);
    bias[c] = static_cast<float>(c % 9) / 4.0f - 1.0f;
    weight[c] = 1.0f + 0.1f * static_cast<float>(c % 3);
    shift[c] = 0.1f * static_cast<float>(c % 4);
  }
  mmfast::Int8Pass pass{rows,
                        width,
                        product.data(),
                        row_scale.data(),
                        scale.data(),
                        bias.data(),
                        nullptr,
                        residual.data(),
                        total.data(),
                        gelu,
                        normed ? weight.data() : nullptr,
                        normed ? shift.data() : nullptr,
                        1e-6f,
                        out.data(),
                        out_scale.data()};
  mmfast::int8_pass(pass, threads, widest);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> x(width);
    double mean = 0.0, squares = 0.0, most = 0.0;
    for (int64_t c = 0; c < width; ++c) {
      x[c] = double{row_scale[r]} * scale[c] * product[r * width + c] + bias[c] + residual[r * width + c];
      EXPECT(std::abs(total[r * width + c] - x[c]) < 1e-5);
      if (gelu == mmfast::Gelu::erf) x[c] *= 0.5 * std::erfc(-x[c] / std::sqrt(2.0));
      if (gelu == mmfast::Gelu::quick) x[c] /= 1.0 + std::exp(-1.702 * x[c]);
      mean += x[c] / width;
    }
    for (const double v : x) squares += (v - mean) * (v - mean) / width;
    for (int64_t c = 0; c < width; ++c) {
      if (normed) x[c] = (x[c] - mean) / std::sqrt(squares + 1e-6) * weight[c] + shift[c];
      most = std::max(most, std::abs(x[c]));
    }
    EXPECT(std::abs(out_scale[r] - most / 127.0) < 1e-6 * most);
    for (int64_t c = 0; c < width; ++c) {
      EXPECT(out[r * width + c] > -128 && std::abs(x[c] / out_scale[r] - out[r * width + c]) < 0.501);
    }
  }
  if (rows == 0) return;
  residual[0] = NAN;
  residual[(rows - 1) * width] = rows > 1 ? -INFINITY : NAN;
  pass.total = residual.data();
  mmfast::int8_pass(pass, threads, widest);
  EXPECT(std::isnan(out_scale[0]) && std::isnan(out_scale[rows - 1]) && out[width - 1] == 0);
  EXPECT(rows < 3 || !std::isnan(out_scale[1]));
  pass.width = width + 1;
  EXPECT(refuses([&] { mmfast::int8_pass(pass, threads, widest); }));
}

void check_int8s() {
  for (const int widest : {16, 32, 64}) {
    for (const int threads : {1, 3}) {
      check_int8(1, 16, mmfast::Gelu::none, true, threads, widest);
      check_int8(33, 48, mmfast::Gelu::erf, false, threads, widest);
      check_int8(3, 1552, mmfast::Gelu::quick, true, threads, widest);
      check_int8(301, 400, mmfast::Gelu::erf, true, threads, widest);
      check_int8(0, 32, mmfast::Gelu::none, false, threads, widest);
    }
  }
}

}  // namespace

int main() {
  check_threads();
  check_sampler();
  check_gathers();
  check_union();
  check_attentions();
  check_teds();
  check_int8s();
  // Callers on several threads at once, each with threads of its own.
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      check_gather<uint8_t, float>(3, 2, 16, true, true, 2);
      check_int8(301, 400, mmfast::Gelu::erf, true, 2, 64);
      check_attention({0, 49, 97}, {0, 3, 120}, 64, true, 2, 64);
      EXPECT(sample({1, 2, 3}, 2, 2, 300, 150, 5, true, 2) == sample({1, 2, 3}, 2, 2, 300, 150, 5, true, 1));
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::puts("all as expected");
}
