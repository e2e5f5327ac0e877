#include "attention_wgmma.h"

#include "attention_wgmma_block.h"
#include "attention_wgmma_plan.h"
#include "launch.h"
#include "wgmma.h"

namespace mmfast {
namespace {

// Blocks of an SM, whose 65536 registers they share; and so that its 228 KB hold their shared memory.
constexpr int blocks_of(int keys) {
  return keys <= 80 ? 5 : keys <= 160 ? 4 : keys <= 200 ? 3 : 2;
}

template <class Shape, bool kBf16>
__global__ void __launch_bounds__(kWarpgroup, blocks_of(Shape::keys))
    attention_kernel(const __grid_constant__ WgmmaWork work) {
  extern __shared__ __align__(1024) char memory[];
  attend<Hopper, Shape, kBf16>(work, static_cast<uint32_t>(__cvta_generic_to_shared(memory)));
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("attention_wgmma: no CUDA device");
  }
  return value;
}

}  // namespace

void attention_wgmma_cuda(const WgmmaAttention& job, void* out, float* lse, void* stream) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
  if (major != 9 || minor != 0)
    throw std::runtime_error("attention_wgmma: needs a device of compute capability 9.0, this is one of " +
                             std::to_string(major) + "." + std::to_string(minor));
  if (job.sequences * job.heads * job.n_q == 0) return;
  with_wgmma_shape(job.n_k, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t slots = int64_t{attribute(cudaDevAttrMultiProcessorCount)} * blocks_of(Shape::keys);
    const WgmmaGrid grid = wgmma_grid(job.sequences * job.heads, ceil_div(job.n_q, kTileRows), slots);
    const auto kernel = job.bf16 ? attention_kernel<Shape, true> : attention_kernel<Shape, false>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::shared_bytes);
    kernel<<<dim3(grid.blocks, grid.parts), kWarpgroup, Shape::shared_bytes, static_cast<cudaStream_t>(stream)>>>(
        wgmma_work(job, grid.parts, out, lse));
    check_launch("attention_wgmma");
  });
}

}  // namespace mmfast
