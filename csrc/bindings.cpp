// The table of what Python may call. Tensors arrive as addresses; the Python side keeps them alive and checks their
// types.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "attention.h"
#include "gather.h"
#include "int8.h"
#include "pack.h"
#include "philox.h"
#include "sampler.h"
#include "ted.h"
#ifdef MMFAST_WITH_CUDA
#include "cuda/device.h"
#endif
#ifdef MMFAST_WITH_WGMMA
#include "cuda/attention_wgmma.h"
#endif

namespace py = pybind11;
using Address = std::uintptr_t;  // of a tensor's first element; 0 where there is none
using Five = std::array<int64_t, 5>;
using Three = std::array<int64_t, 3>;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> key) {
  const mmfast::Words4 out = mmfast::philox4x32_10({{c[0], c[1], c[2], c[3]}}, key[0], key[1]);
  return {out.word[0], out.word[1], out.word[2], out.word[3]};
}

mmfast::Video video_at(Address data, int type, const Five& size, const Five& stride) {
  mmfast::Video video{at<void>(data), mmfast::Pixel(type), {}, {}};
  std::copy(size.begin(), size.end(), video.size);
  std::copy(stride.begin(), stride.end(), video.stride);
  return video;
}

void sample_keep(Address clip_ids, int64_t batch, int32_t views, int32_t slots, int32_t cells, int32_t keep,
                 uint64_t seed, bool per_slot, Address keep_idx, int threads) {
  mmfast::sample_keep(at<int64_t>(clip_ids), {batch, views, slots, cells, keep, seed, per_slot}, at<int32_t>(keep_idx),
                      threads);
}

void gather_tubes(Address video, int video_type, const Five& size, const Five& stride, Address token, Address clip,
                  int64_t count, int32_t tubelet, int32_t patch, Address rows, int rows_type, Address scale,
                  Address shift, int threads) {
  mmfast::gather_tubes(video_at(video, video_type, size, stride),
                       {at<int32_t>(token), at<int32_t>(clip), count, tubelet, patch},
                       {at<void>(rows), mmfast::Pixel(rows_type), at<float>(scale), at<float>(shift)}, threads);
}

template <class Float>
mmfast::HeadsOf<Float> heads_at(Address data, const Three& layout) {
  return {at<Float>(data), layout[0], layout[1], layout[2]};
}

mmfast::Attention attention_of(Address q, const Three& q_layout, Address k, const Three& k_layout, Address v,
                               const Three& v_layout, Address cu_q, int64_t n_q, Address cu_k, int64_t n_k,
                               int64_t sequences, int64_t heads, int64_t d, bool causal, float scale) {
  return {heads_at<const float>(q, q_layout),
          heads_at<const float>(k, k_layout),
          heads_at<const float>(v, v_layout),
          {at<int32_t>(cu_q), n_q},
          {at<int32_t>(cu_k), n_k},
          sequences,
          heads,
          d,
          causal,
          scale};
}

void attention(Address q, const Three& q_layout, Address k, const Three& k_layout, Address v, const Three& v_layout,
               Address cu_q, int64_t n_q, Address cu_k, int64_t n_k, int64_t sequences, int64_t heads, int64_t d,
               bool causal, float scale, Address out, Address lse, int threads, int widest) {
  mmfast::attention(
      attention_of(q, q_layout, k, k_layout, v, v_layout, cu_q, n_q, cu_k, n_k, sequences, heads, d, causal, scale),
      at<float>(out), at<float>(lse), threads, widest);
}

void attention_backward(Address q, const Three& q_layout, Address k, const Three& k_layout, Address v,
                        const Three& v_layout, Address cu_q, int64_t n_q, Address cu_k, int64_t n_k, int64_t sequences,
                        int64_t heads, int64_t d, bool causal, float scale, Address dout, Address out, Address lse,
                        Address dq, const Three& dq_layout, Address dk, const Three& dk_layout, Address dv,
                        const Three& dv_layout, int threads, int widest) {
  mmfast::attention_backward(
      attention_of(q, q_layout, k, k_layout, v, v_layout, cu_q, n_q, cu_k, n_k, sequences, heads, d, causal, scale),
      {at<float>(dout), at<float>(out), at<float>(lse), heads_at<float>(dq, dq_layout), heads_at<float>(dk, dk_layout),
       heads_at<float>(dv, dv_layout)},
      threads, widest);
}

// time_shift, time_taps, time_bias, space_shift, space_taps, space_bias
using Six = std::array<Address, 6>;

mmfast::TedSites sites_at(Address table, const Three& size) {
  return {at<int32_t>(table), size[0], size[1], size[2]};
}

mmfast::TedParameters ted_parameters(const Six& from, int64_t time_width, int64_t space_width) {
  return {time_width,         space_width,        at<float>(from[0]), at<float>(from[1]),
          at<float>(from[2]), at<float>(from[3]), at<float>(from[4]), at<float>(from[5])};
}

mmfast::TedGradients ted_gradients(const Six& to) {
  return {at<float>(to[0]), at<float>(to[1]), at<float>(to[2]), at<float>(to[3]), at<float>(to[4]), at<float>(to[5])};
}

void ted_stencil(Address h, Address sites, const Three& size, const Six& parameters, int64_t time_width,
                 int64_t space_width, Address out, int threads, int widest) {
  mmfast::ted_stencil(at<float>(h), sites_at(sites, size), ted_parameters(parameters, time_width, space_width),
                      at<float>(out), threads, widest);
}

void ted_stencil_backward(Address dout, Address h, Address sites, const Three& size, const Six& parameters,
                          int64_t time_width, int64_t space_width, Address dh, const Six& gradients, int threads,
                          int widest) {
  mmfast::ted_stencil_backward(at<float>(dout), at<float>(h), sites_at(sites, size),
                               ted_parameters(parameters, time_width, space_width), at<float>(dh),
                               ted_gradients(gradients), threads, widest);
}

void int8_pass(int64_t rows, int64_t width, Address product, Address row_scale, Address column_scale, Address bias,
               Address values, Address residual, Address total, int gelu, Address norm_weight, Address norm_bias,
               float eps, Address out, Address out_scale, int threads, int widest) {
  mmfast::int8_pass({rows, width, at<int32_t>(product), at<float>(row_scale), at<float>(column_scale), at<float>(bias),
                     at<float>(values), at<float>(residual), at<float>(total), mmfast::Gelu(gelu),
                     at<float>(norm_weight), at<float>(norm_bias), eps, at<int8_t>(out), at<float>(out_scale)},
                    threads, widest);
}

int64_t union_rows(Address keep_idx, int64_t tokens, Address cu_seqlens, int64_t sequences, int64_t views,
                   Address union_idx, Address union_clip, Address row_of) {
  return mmfast::union_rows(at<int32_t>(keep_idx), tokens, at<int32_t>(cu_seqlens), sequences, views,
                            at<int32_t>(union_idx), at<int32_t>(union_clip), at<int32_t>(row_of));
}

#ifdef MMFAST_WITH_CUDA
void sample_keep_cuda(Address clip_ids, int64_t batch, int32_t views, int32_t slots, int32_t cells, int32_t keep,
                      uint64_t seed, bool per_slot, Address keep_idx, Address stream) {
  mmfast::sample_keep_cuda(at<int64_t>(clip_ids), {batch, views, slots, cells, keep, seed, per_slot},
                           at<int32_t>(keep_idx), at<void>(stream));
}

void gather_tubes_cuda(Address video, int video_type, const Five& size, const Five& stride, Address token, Address clip,
                       int64_t count, int32_t tubelet, int32_t patch, Address rows, int rows_type, Address scale,
                       Address shift, Address stream) {
  mmfast::gather_tubes_cuda(
      video_at(video, video_type, size, stride), {at<int32_t>(token), at<int32_t>(clip), count, tubelet, patch},
      {at<void>(rows), mmfast::Pixel(rows_type), at<float>(scale), at<float>(shift)}, at<void>(stream));
}

void ted_stencil_cuda(Address h, int type, Address sites, const Three& size, const Six& parameters, int64_t time_width,
                      int64_t space_width, Address out, Address stream) {
  mmfast::ted_stencil_cuda(at<void>(h), mmfast::TedType(type), sites_at(sites, size),
                           ted_parameters(parameters, time_width, space_width), at<void>(out), at<void>(stream));
}

void ted_stencil_backward_cuda(Address dout, Address h, int type, Address sites, const Three& size,
                               const Six& parameters, int64_t time_width, int64_t space_width, Address dh,
                               const Six& gradients, Address partials, int64_t groups, Address stream) {
  const mmfast::TedGradients wanted = ted_gradients(gradients);
  mmfast::ted_stencil_backward_cuda(at<void>(dout), at<void>(h), mmfast::TedType(type), sites_at(sites, size),
                                    ted_parameters(parameters, time_width, space_width), at<void>(dh),
                                    wanted.time_taps ? &wanted : nullptr, at<float>(partials), groups,
                                    at<void>(stream));
}
#endif

#ifdef MMFAST_WITH_WGMMA
using Two = std::array<int64_t, 2>;

void attention_wgmma_cuda(Address q, const Two& q_layout, Address k, const Two& k_layout, Address v,
                          const Two& v_layout, int64_t sequences, int64_t heads, int64_t n_q, int64_t n_k, float scale,
                          bool bf16, Address out, Address lse, Address stream) {
  mmfast::attention_wgmma_cuda({{at<void>(q), q_layout[0], q_layout[1]},
                                {at<void>(k), k_layout[0], k_layout[1]},
                                {at<void>(v), v_layout[0], v_layout[1]},
                                sequences,
                                heads,
                                n_q,
                                n_k,
                                scale,
                                bf16},
                               at<void>(out), at<float>(lse), at<void>(stream));
}
#endif

std::string build_info() {
  std::string info = "host " MMFAST_HOST_COMPILER;
#ifdef MMFAST_WITH_CUDA
  return info + ", " + mmfast::cuda_compiler() + " for " + mmfast::cuda_archs();
#else
  return info + ", no CUDA";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.doc() = "C++ and CUDA routines of mmfast on raw addresses; mmfast_kernels.sampling and .gather are their front.";
  m.def("philox4x32_10", &philox, no_gil);
  m.def("sample_keep", &sample_keep, no_gil);
  m.def("gather_tubes", &gather_tubes, no_gil);
  m.def("attention", &attention, no_gil);
  m.def("attention_backward", &attention_backward, no_gil);
  m.def("ted_stencil", &ted_stencil, no_gil);
  m.def("ted_stencil_backward", &ted_stencil_backward, no_gil);
  m.def("int8_pass", &int8_pass, no_gil);
  m.def("union_rows", &union_rows, no_gil);
  m.def("build_info", &build_info, no_gil);
#ifdef MMFAST_WITH_CUDA
  m.attr("with_cuda") = true;
  m.attr("cuda_archs") = mmfast::cuda_archs();
  m.attr("max_cuda_cells") = mmfast::kMaxCudaCells;
  m.def("device_count", &mmfast::device_count, no_gil);
  m.def("sample_keep_cuda", &sample_keep_cuda, no_gil);
  m.def("gather_tubes_cuda", &gather_tubes_cuda, no_gil);
  m.def("ted_stencil_cuda", &ted_stencil_cuda, no_gil);
  m.def("ted_stencil_backward_cuda", &ted_stencil_backward_cuda, no_gil);
#else
  m.attr("with_cuda") = false;
  m.attr("cuda_archs") = "";
  m.attr("max_cuda_cells") = 0;
  m.def("device_count", [] { return 0; });
#endif
#ifdef MMFAST_WITH_WGMMA
  m.attr("max_wgmma_keys") = mmfast::kMaxWgmmaKeys;
  m.def("attention_wgmma_cuda", &attention_wgmma_cuda, no_gil);
#else
  m.attr("max_wgmma_keys") = 0;
#endif
}
