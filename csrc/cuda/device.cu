#include "device.h"

#include <cuda_runtime.h>

namespace mmfast {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

std::string cuda_compiler() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

std::string cuda_archs() {
  return MMFAST_CUDA_ARCHS;
}

}  // namespace mmfast
