// What one block of the attention kernel does, on instructions that `Isa` provides: wgmma.h's on the GPU, and an
// emulation of them in the tests.
//
// A block is one warpgroup. It walks over pairs of a sequence and a head, and has a pair's K and V whole in shared
// memory. The scores of 64 queries against all keys come in one chunk or two, as wide as attention_wgmma_plan.h says:
// the second chunk is multiplied while the first is exponentiated, and the first is summed over V while the second is
// exponentiated. The next pair's keys are copied as soon as the last tile is done with these. (All scores at once would
// need no maximum carried along, but with 98 registers for weights and 32 for sums beside 196 the compiler spills.)
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MMFAST_INSIDE __device__ __forceinline__
#define MMFAST_CONSTANT __host__ __device__ constexpr
#else
#define MMFAST_INSIDE inline
#define MMFAST_CONSTANT constexpr
#endif

namespace mmfast {

constexpr int kTileRows = 64, kHeadBytes = 128, kWarpgroup = 128;

struct WgmmaPart {
  const char* data;   // [tokens, heads, 64]
  int64_t row, head;  // strides in bytes
};

struct WgmmaWork {
  WgmmaPart q, k, v;
  char* out;   // [tokens, heads, 64]
  float* lse;  // [heads, tokens] or null
  int64_t tokens;
  uint32_t n_q, n_k, heads;
  uint32_t pairs;          // sequences * heads
  uint32_t tiles, run;     // of 64 queries in a sequence, and how many of them a block takes
  uint32_t magic, halves;  // x / heads is the upper word of x * magic, halved so often
  uint32_t zero;           // 0, which the compiler does not know
  float scale_log2;
};

// The widths of the one or two chunks of a row of scores, the wider one first. The columns before kSure are keys in
// every case.
template <int kSure, int kWidth, int kSecondWidth = 0>
struct WgmmaShape {
  static constexpr int sure = kSure, keys = kWidth + kSecondWidth, widest = kWidth, chunks = kSecondWidth ? 2 : 1;
  static MMFAST_CONSTANT int width(int chunk) { return chunk ? kSecondWidth : kWidth; }
  static MMFAST_CONSTANT int begin(int chunk) { return chunk ? kWidth : 0; }
  static constexpr uint32_t value_rows = (keys + 15) / 16 * 16;  // V is taken by 16 rows
  static constexpr uint32_t operand_bytes = value_rows * kHeadBytes;
  static constexpr uint32_t shared_bytes = 2 * operand_bytes + kTileRows * kHeadBytes;
  static_assert(kSecondWidth == 0 || (kWidth + 15) / 16 + (kSecondWidth + 15) / 16 == (keys + 15) / 16);
};

// A tile of queries: its first row, and whose it is.
struct Tile {
  uint32_t sequence, head, row;
};

// What a block is at, and where in shared memory it has K, V and Q.
struct Spot {
  uint32_t pair, tile;
  uint32_t k_at, v_at, q_at;
};

// What a thread keeps of its two rows while the chunks pass.
struct Rows {
  float o[32];     // the weighted sums of V's columns
  float shift[2];  // a score in units of log2 that is not far below the largest so far
  float sum[2];    // of the weights
};

struct alignas(16) Words4 {
  uint32_t word[4];
};

template <class Isa>
MMFAST_INSIDE Tile tile_of(const WgmmaWork& work, uint32_t pair, uint32_t tile) {
  const uint32_t sequence = work.heads == 1 ? pair : Isa::high_word(pair, work.magic) >> work.halves;
  return {sequence, pair - sequence * work.heads, tile * kTileRows};
}

// Of every pair a block takes the tiles from this on, `run` of them or up to the last.
template <class Isa>
MMFAST_INSIDE uint32_t first_tile(const WgmmaWork& work) {
  return Isa::block_y() * work.run;
}

template <class Isa>
MMFAST_INSIDE bool at_last_tile(const WgmmaWork& work, const Spot& spot) {
  return spot.tile + 1 == work.tiles || spot.tile + 1 == first_tile<Isa>(work) + work.run;
}

template <class Isa>
MMFAST_INSIDE bool more_pairs(const WgmmaWork& work, const Spot& spot) {
  return work.pairs - spot.pair > Isa::blocks();
}

// kRows rows of 128 bytes, swizzled; they are zero from `live` on.
template <class Isa, uint32_t kRows>
MMFAST_INSIDE void copy_rows(uint32_t to, const char* from, int64_t stride, uint32_t live) {
  constexpr uint32_t kAtOnce = kWarpgroup / 8, kTimes = kRows / kAtOnce;
  const uint32_t thread = Isa::thread(), row = thread / 8, piece = thread % 8;
  to += row * kHeadBytes + (piece ^ (row % 8)) * 16;
  from += row * stride + piece * 16;
#pragma unroll 4
  for (uint32_t i = 0; i < kTimes; ++i) {
    Isa::copy16(to + i * kAtOnce * kHeadBytes, from, row + i * kAtOnce < live);
    from += kAtOnce * stride;
  }
  if (kRows % kAtOnce && row < kRows % kAtOnce)
    Isa::copy16(to + kTimes * kAtOnce * kHeadBytes, from, row + kTimes * kAtOnce < live);
}

MMFAST_INSIDE const char* rows_of(const WgmmaPart& part, const Tile& at, uint32_t n) {
  return part.data + int64_t{at.sequence} * n * part.row + at.head * part.head;
}

template <class Isa>
MMFAST_INSIDE void copy_queries(const WgmmaWork& work, const Spot& spot, const Tile& at) {
  const char* from = rows_of(work.q, at, work.n_q) + at.row * work.q.row;
  copy_rows<Isa, kTileRows>(spot.q_at, from, work.q.row, work.n_q - at.row);
}

// The keys of one chunk.
template <class Isa, class Shape, int kChunk>
MMFAST_INSIDE void copy_keys(const WgmmaWork& work, const Spot& spot, const Tile& at) {
  constexpr uint32_t kBegin = Shape::begin(kChunk);
  const char* from = rows_of(work.k, at, work.n_k) + kBegin * work.k.row;
  copy_rows<Isa, Shape::width(kChunk)>(spot.k_at + kBegin * kHeadBytes, from, work.k.row, work.n_k - kBegin);
}

template <class Isa, class Shape>
MMFAST_INSIDE void copy_values(const WgmmaWork& work, const Spot& spot, const Tile& at) {
  copy_rows<Isa, Shape::value_rows>(spot.v_at, rows_of(work.v, at, work.n_k), work.v.row, work.n_k);
  Isa::copies_commit();
}

// What this thread's copies have written is there for every thread and for products.
template <class Isa, int kPending>
MMFAST_INSIDE void finish_copies() {
  Isa::template copies_wait<kPending>();
  Isa::publish();
  Isa::barrier();
}

// Of rows of 128 bytes with the 128-byte swizzle, for products and transposed ones alike: 1024 bytes from 8 rows to the
// next 8. The other offset is not used: no matrix is wider than its rows.
MMFAST_INSIDE uint64_t descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | (address & 0x3FFFF) >> 4;
}

template <class Isa, class Shape, bool kBf16, int kChunk>
MMFAST_INSIDE void begin_scores(const Spot& spot, float (&s)[Shape::widest / 2]) {
  const uint64_t q = descriptor(spot.q_at), k = descriptor(spot.k_at + Shape::begin(kChunk) * kHeadBytes);
  Isa::products_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)  // 16 of the head's columns, 32 bytes, at a time
    Isa::template scores<kBf16, Shape::width(kChunk)>(s, q + 2 * step, k + 2 * step, step > 0);
  Isa::products_commit();
}

// A thread has scores of two rows, 8 apart: of every 8 columns, 2 of the first row (s[4 i], s[4 i + 1]) and the same of
// the second.
template <class Isa, class Shape, int kChunk>
MMFAST_INSIDE void mask(const WgmmaWork& work, float (&s)[Shape::widest / 2]) {
  constexpr int kBegin = Shape::begin(kChunk), kFrom = Shape::sure > kBegin ? Shape::sure - kBegin : 0;
  const uint32_t column = kBegin + Isa::thread() % 4 * 2;
#pragma unroll
  for (int i = kFrom / 2; i < Shape::width(kChunk) / 2; ++i)
    if (i / 4 * 8 + i % 2 + column >= work.n_k) s[i] = -Isa::infinity();
}

// The largest of the chunk's scores of each row, in units of log2.
template <class Isa, int kCount, int kSize>
MMFAST_INSIDE void largest(const WgmmaWork& work, const float (&s)[kSize], float (&high)[2]) {
  float top[4] = {s[0], s[1], s[2], s[3]};  // two of a row, since one maximum has to wait for the last
#pragma unroll
  for (int i = 4; i < kCount; ++i) top[i % 4] = Isa::max(top[i % 4], s[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x = Isa::max(top[2 * half], top[2 * half + 1]);
    x = Isa::max(x, Isa::exchange(x, 1));
    high[half] = Isa::max(x, Isa::exchange(x, 2)) * work.scale_log2;
  }
}

// Weights of the chunk's scores, as products take them: p[b] of 16 keys. Where a warp's rows are all behind the last
// query nothing is exponentiated, and the weights may be anything.
template <class Isa, bool kBf16, int kCount, int kSize, int kBlocks>
MMFAST_INSIDE void weights(const WgmmaWork& work, const Spot& spot, const float (&s)[kSize], Rows& rows,
                           uint32_t (&p)[kBlocks][4]) {
  constexpr int kRun = 5;  // blocks whose multiply-adds may be done ahead: each takes a register, and none is free
  const bool lives = spot.tile * kTileRows + Isa::thread() / 32 * 16 < work.n_q;
  float shift[2] = {rows.shift[0], rows.shift[1]}, before = 0.0f;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    if (block % kRun == 0 && block > 0)
      for (float& x : shift) x = Isa::tied(x, before, work.zero);
#pragma unroll
    for (int two = 0; two < 4; ++two) {
      const int i = 8 * block + 2 * two;
      p[block][two] = 0;
      if (i < kCount) {
        const float left = Isa::exp2_if(lives, Isa::fma(s[i], work.scale_log2, -shift[two % 2]));
        const float right = Isa::exp2_if(lives, Isa::fma(s[i + 1], work.scale_log2, -shift[two % 2]));
        rows.sum[two % 2] += left + right;
        p[block][two] = Isa::template pack<kBf16>(left, right);
        if (block % kRun == kRun / 2) before = right;
      }
    }
  }
}

// The chunks from kChunk on. `s`: where its scores are being made. `spare`: for those of the next.
template <class Isa, class Shape, bool kBf16, int kChunk>
MMFAST_INSIDE void pass(const WgmmaWork& work, const Spot& spot, Rows& rows, float (&s)[Shape::widest / 2],
                        float (&spare)[Shape::widest / 2]) {
  constexpr int kWidth = Shape::width(kChunk), kBegin = Shape::begin(kChunk), kBlocks = (kWidth + 15) / 16;
  constexpr bool kFirst = kChunk == 0, kLast = kChunk + 1 == Shape::chunks;
  constexpr float kSlack = 8.0f;
  Isa::template products_wait<kFirst ? 0 : 1>();  // what came before it, the sums of the last chunk, may go on
  Isa::template hold<0, kWidth / 2>(s);
  if constexpr (!kLast) begin_scores<Isa, Shape, kBf16, kChunk + 1>(spot, spare);
  if constexpr (kBegin + kWidth > Shape::sure)
    if (work.n_k < Shape::keys) mask<Isa, Shape, kChunk>(work, s);

  // The shift need not be the largest score, only so near to it that no weight is too large for 16 bits. While it
  // stays, the sums over V need not be waited for.
  float high[2], fade[2];
  largest<Isa, kWidth / 2>(work, s, high);
  bool rises = true;
  if constexpr (kFirst) {
    rows.shift[0] = high[0], rows.shift[1] = high[1];
  } else {
    rises = Isa::barrier_or(high[0] > rows.shift[0] + kSlack || high[1] > rows.shift[1] + kSlack);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = rises ? Isa::max(high[half], rows.shift[half]) : rows.shift[half];
      fade[half] = Isa::exp2_if(true, rows.shift[half] - shift);
      rows.sum[half] *= fade[half];
      rows.shift[half] = shift;
    }
  }

  // In the last tile every warp is done with these keys, after the last chunk with the queries too: the next take their
  // places.
  const bool ends = at_last_tile<Isa>(work, spot), leaves = ends && more_pairs<Isa>(work, spot);
  if (leaves || (kLast && !ends)) {
    if constexpr (kFirst) Isa::barrier();
    const Tile next = leaves ? tile_of<Isa>(work, spot.pair + Isa::blocks(), first_tile<Isa>(work))
                             : tile_of<Isa>(work, spot.pair, spot.tile + 1);
    if (leaves) copy_keys<Isa, Shape, kChunk>(work, spot, next);
    if constexpr (kLast) copy_queries<Isa>(work, spot, next);
  }

  uint32_t p[kBlocks][4];
  weights<Isa, kBf16, kWidth / 2>(work, spot, s, rows, p);
  if constexpr (kFirst) {
    if (spot.tile == first_tile<Isa>(work)) finish_copies<Isa, 0>();  // of V
  } else if (rises) {
    Isa::template products_wait<kLast ? 0 : 1>();
    Isa::template hold<0, 32>(rows.o);
#pragma unroll
    for (int i = 0; i < 32; ++i) rows.o[i] *= fade[i / 2 % 2];
  }
  const uint64_t v = descriptor(spot.v_at + kBegin * kHeadBytes);
  Isa::products_fence();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
    Isa::template weigh<kBf16>(rows.o, p[block], v + block * (16 * kHeadBytes / 16), !kFirst || block > 0);
  Isa::products_commit();
  if constexpr (kLast) {
    Isa::template products_wait<0>();
    Isa::template hold<0, 32>(rows.o);
  } else {
    pass<Isa, Shape, kBf16, kChunk + 1>(work, spot, rows, spare, s);
  }
}

// Among four neighbouring lanes: word i of lane j becomes word j of lane i.
template <class Isa>
MMFAST_INSIDE void transpose_in_quad(uint32_t lane, uint32_t (&word)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = Isa::exchange(lane & 1 ? word[i] : word[i + 1], 1);
    (lane & 1 ? word[i] : word[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = Isa::exchange(lane & 2 ? word[i] : word[i + 2], 2);
    (lane & 2 ? word[i] : word[i + 2]) = got;
  }
}

// out, 16 bytes a store, and lse.
template <class Isa, bool kBf16>
MMFAST_INSIDE void store_tile(const WgmmaWork& work, const Tile& at, const Rows& rows) {
  const uint32_t thread = Isa::thread(), lane = thread % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = at.row + thread / 32 * 16 + lane / 4 + 8 * half;
    const int64_t token = int64_t{at.sequence} * work.n_q + row;
    float sum = rows.sum[half];
    sum += Isa::exchange(sum, 1);
    sum += Isa::exchange(sum, 2);
    const float weight = 1.0f / sum;
#pragma unroll
    for (int left = 0; left < 8; left += 4) {
      Words4 words;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = rows.o + 4 * (left + i) + 2 * half;
        words.word[i] = Isa::template pack<kBf16>(pair[0] * weight, pair[1] * weight);
      }
      transpose_in_quad<Isa>(lane, words.word);
      char* to = work.out + (token * work.heads + at.head) * kHeadBytes + (left + lane % 4) * 16;
      if (row < work.n_q) *reinterpret_cast<Words4*>(to) = words;
    }
    if (work.lse && lane % 4 == 0 && row < work.n_q)
      work.lse[at.head * work.tokens + token] = (rows.shift[half] + Isa::log2(sum)) * 0.693147180559945309f;
  }
}

// `shared`: 1024-byte aligned address of Shape::shared_bytes.
template <class Isa, class Shape, bool kBf16>
MMFAST_INSIDE void attend(const WgmmaWork& work, uint32_t shared) {
  Spot spot{Isa::block_x(), first_tile<Isa>(work), shared, shared + Shape::operand_bytes,
            shared + 2 * Shape::operand_bytes};
  const Tile start = tile_of<Isa>(work, spot.pair, spot.tile);
  copy_queries<Isa>(work, spot, start);
  copy_rows<Isa, Shape::keys>(spot.k_at, rows_of(work.k, start, work.n_k), work.k.row, work.n_k);
  Isa::copies_commit();
  copy_values<Isa, Shape>(work, spot, start);
  for (;;) {
    if (spot.tile == first_tile<Isa>(work))
      finish_copies<Isa, 1>();  // all but V, which was asked for last
    else
      finish_copies<Isa, 0>();

    Rows rows;
    rows.sum[0] = rows.sum[1] = 0.0f;
    float s[Shape::widest / 2], spare[Shape::widest / 2];
    begin_scores<Isa, Shape, kBf16, 0>(spot, s);
    pass<Isa, Shape, kBf16, 0>(work, spot, rows, s, spare);
    Isa::copies_commit();

    const Tile here = tile_of<Isa>(work, spot.pair, spot.tile);
    const bool ends = at_last_tile<Isa>(work, spot), leaves = ends && more_pairs<Isa>(work, spot);
    if (leaves) {
      spot.pair += Isa::blocks();
      spot.tile = first_tile<Isa>(work);
      Isa::barrier();  // every warp is done with V
      copy_values<Isa, Shape>(work, spot, tile_of<Isa>(work, spot.pair, spot.tile));
    } else {
      ++spot.tile;
    }
    store_tile<Isa, kBf16>(work, here, rows);
    if (ends && !leaves) return;
  }
}

}  // namespace mmfast
