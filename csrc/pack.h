// The union of the tokens that the views of a clip keep, so that a tube seen by several views is moved and embedded
// once.
#pragma once

#include <cstdint>

namespace mmfast {

// keep_idx [T] holds `sequences` ascending lists end to end, cu_seqlens [sequences + 1] their bounds, `views` in a row
// a clip. Writes, clip by clip, the ascending ids that any view of it keeps (union_idx), their clip (union_clip), and
// for every packed token its row in that list (row_of [T]). Returns the number of rows; the first two have room for T.
// Throws std::invalid_argument on bounds or ids that do not ascend.
int64_t union_rows(const int32_t* keep_idx, int64_t tokens, const int32_t* cu_seqlens, int64_t sequences, int64_t views,
                   int32_t* union_idx, int32_t* union_clip, int32_t* row_of);

}  // namespace mmfast
