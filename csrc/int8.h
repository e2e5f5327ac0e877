// What stands between two int8 products: one pass over rows, from the sums of one to the int8 rows of the next.
#pragma once

#include <cstdint>

namespace mmfast {

constexpr int64_t kInt8Columns = 16;  // a row's width is a multiple of it

enum class Gelu : int { none = 0, erf = 1, quick = 2 };

// For each row, in this order: the values, plus the residual, written to total; GELU; LayerNorm; rounded to int8.
struct Int8Pass {
  int64_t rows, width;
  const int32_t* product;     // [rows, width], or null. The values are product * (row_scale * column_scale) + bias
  const float* row_scale;     // [rows]
  const float* column_scale;  // [width]
  const float* bias;          // [width], or null for 0
  const float* values;        // [rows, width], where there is no product
  const float* residual;      // [rows, width], or null
  float* total;               // [rows, width], may be the residual itself; or null
  Gelu gelu;
  const float *norm_weight, *norm_bias;  // [width], or null for no LayerNorm
  float eps;
  int8_t* out;       // [rows, width], or null
  float* out_scale;  // [rows]
};

// A row of out is round(x / out_scale) with out_scale = max |x| / 127: within -127..127, ties to even. A row with NaN
// or infinity gets 0 and the scale NaN, so that it is NaN throughout after the next product; one below 1e-30 throughout
// gets 0 and 0. The result does not depend on `threads`. widest: the most bytes a vector register may have (16, 32, 64;
// the processor's own limit holds as well). Throws std::invalid_argument for another width.
void int8_pass(const Int8Pass& pass, int threads, int widest = 64);

}  // namespace mmfast
