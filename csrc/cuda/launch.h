// Shared by the launchers: sizes of a grid, and an exception where a launch was refused.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mmfast {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline unsigned blocks(int64_t count) {
  if (count > INT32_MAX)
    throw std::invalid_argument("a grid of " + std::to_string(count) + " blocks, at most 2^31 - 1");
  return static_cast<unsigned>(count);
}

}  // namespace mmfast
