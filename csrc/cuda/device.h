// What the build and the machine offer; for code that is not compiled by nvcc.
#pragma once

#include <string>

namespace mmfast {

int device_count();  // 0 without a GPU or a driver
std::string cuda_compiler();
std::string cuda_archs();

}  // namespace mmfast
