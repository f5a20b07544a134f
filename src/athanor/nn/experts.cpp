// The forward pass of a mixture's experts on CPUs with AVX-512, for nn/native.py, which compiles this file and says what it takes.
//
// Why not PyTorch's products: an expert has few rows, so that each product of its own costs more to start than to compute, and
// oneDNN copies the weight into an order of its own every time. Here 16 rows are the lanes of a vector, entries of the weight are
// broadcast from where they are, and all experts share one parallel region.
//
// Legend: S rows in the order of their experts, D width, E experts, F inner width, U rows of `up` (2F with a gate, else F).

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int ROWS = 16;     // of a tile, one a lane
constexpr int STEP = 16;     // rows of a weight that are computed together
constexpr int COLUMNS = 64;  // of a product that are one piece of work

struct Bf16 {
  using Entry = uint16_t;
  static constexpr int PAIR = 2;  // entries of the inner dimension in one lane

  static __m512 dot(__m512 sum, __m512i x, const Entry* w) {
    int32_t both;
    std::memcpy(&both, w, sizeof both);
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(both));
  }
  static __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
  static __m512 rounded(__m512 v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(v)), 16)); }
  static void store(Entry* at, __m512 v) { _mm256_storeu_si256((__m256i*)at, narrow(v)); }
  static void store_halves(Entry* low, Entry* high, __m512 v) {
    const __m256i all = narrow(v);
    _mm_storeu_si128((__m128i*)low, _mm256_castsi256_si128(all));
    _mm_storeu_si128((__m128i*)high, _mm256_extracti128_si256(all, 1));
  }
  // Neighbouring columns of 16 rows, as lanes of pairs.
  static void store_columns(Entry* at, const __m512* v, int n) {
    for (int i = 0; i < n; i += 2) {
      const __m512i low = _mm512_cvtepu16_epi32(narrow(v[i])), high = _mm512_cvtepu16_epi32(narrow(v[i + 1]));
      _mm512_storeu_si512(at + i * ROWS, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
};

struct Fp32 {
  using Entry = float;
  static constexpr int PAIR = 1;

  static __m512 dot(__m512 sum, __m512i x, const Entry* w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(*w), sum);
  }
  static __m512 rounded(__m512 v) { return v; }
  static void store(Entry* at, __m512 v) { _mm512_storeu_ps(at, v); }
  static void store_halves(Entry* low, Entry* high, __m512 v) {
    _mm256_storeu_ps(low, _mm512_castps512_ps256(v));
    _mm256_storeu_ps(high, _mm512_extractf32x8_ps(v, 1));
  }
  static void store_columns(Entry* at, const __m512* v, int n) {
    for (int i = 0; i < n; i++) _mm512_storeu_ps(at + i * ROWS, v[i]);
  }
};

// e^x to about two units in the last place (Cephes' polynomial); for x below -87 what it is for -87, infinite above 89.
__m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(128.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

__m512 silu(__m512 x) {
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Of 16 vectors of 16 words.
void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// sums[j][at + i] = sum over k of tile_j[k] w_i[k], for N rows of a weight and M tiles, which lie `apart` entries from each other.
// What lies `ahead` of the weight's rows, unless that is 0, is fetched into the cache meanwhile.
template <class Kind, int N, int M>
void dots(const typename Kind::Entry* tile, int64_t apart, const typename Kind::Entry* const* w, int64_t length, int64_t ahead,
          __m512 (*sums)[STEP], int at) {
  constexpr int LINE = 64 / sizeof(typename Kind::Entry);
  __m512 sum[M][N];
  for (int j = 0; j < M; j++)
    for (int i = 0; i < N; i++) sum[j][i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < length; k += Kind::PAIR) {
    if (ahead && k % LINE == 0)
      for (int i = 0; i < N; i++) _mm_prefetch((const char*)(w[i] + ahead + k), _MM_HINT_T0);
    __m512i x[M];
    for (int j = 0; j < M; j++) x[j] = _mm512_loadu_si512(tile + j * apart + k * ROWS);
#pragma GCC unroll 16
    for (int i = 0; i < N; i++)
      for (int j = 0; j < M; j++) sum[j][i] = Kind::dot(sum[j][i], x[j], w[i] + k);
  }
  for (int j = 0; j < M; j++)
    for (int i = 0; i < N; i++) sums[j][at + i] = sum[j][i];
}

// All 16 rows of a weight: at once for one tile, else by eight, so that sums stay in registers.
template <class Kind, int M>
void all_dots(const typename Kind::Entry* tile, int64_t apart, const typename Kind::Entry* const* w, int64_t length, int64_t ahead,
              __m512 (*sums)[STEP]) {
  constexpr int N = M == 1 ? STEP : STEP / 2;
  for (int at = 0; at < STEP; at += N) dots<Kind, N, M>(tile, apart, w + at, length, ahead, sums, at);
}

template <class Kind>
struct Mixture {
  using Entry = typename Kind::Entry;
  const Entry *rows, *up, *down;
  const int32_t* ends;
  Entry *tiles, *products, *inner, *y;
  int64_t n_experts, width, hidden;
  bool gated, relu;
  std::vector<int64_t> first;  // tile of each expert, and one past the last
  std::vector<int64_t> owner;  // expert of each tile

  int64_t start(int64_t e) const { return e ? ends[e - 1] : 0; }
  int64_t row(int64_t t) const { return start(owner[t]) + (t - first[owner[t]]) * ROWS; }
  int64_t filled(int64_t t) const { return std::min<int64_t>(ROWS, ends[owner[t]] - row(t)); }

  void lay_out() {
    first.assign(n_experts + 1, 0);
    for (int64_t e = 0; e < n_experts; e++) {
      first[e + 1] = first[e] + (ends[e] - start(e) + ROWS - 1) / ROWS;
      owner.insert(owner.end(), first[e + 1] - first[e], e);
    }
  }

  // Rows become lanes; lanes that no row fills repeat the first.
  void fill(int64_t t) {
    const int64_t at = row(t), n = filled(t);
    const char* from[ROWS];
    for (int i = 0; i < ROWS; i++) from[i] = (const char*)(rows + (at + (i < n ? i : 0)) * width);
    char* to = (char*)(tiles + t * ROWS * width);
    for (int64_t b = 0; b < width * (int64_t)sizeof(Entry); b += 64) {
      __m512i words[ROWS];
      for (int i = 0; i < ROWS; i++) words[i] = _mm512_loadu_si512(from[i] + b);
      transpose(words);
      for (int i = 0; i < ROWS; i++) _mm512_storeu_si512(to + (b / 4 + i) * 64, words[i]);
    }
  }

  // Calls `then` with each tile of an expert and its 16 sums; the first tile's time is used to fetch what is wanted next.
  template <class Then>
  void products_of(int64_t e, const Entry* inputs, int64_t length, const Entry* const* w, int64_t ahead, Then then) {
    __m512 sums[3][STEP];
    if (Kind::PAIR == 1 && first[e + 1] - first[e] == 1) ahead = 0;  // twice the bytes: there reading is all the work already
    for (int64_t t = first[e]; t < first[e + 1];) {
      const Entry* tile = inputs + t * ROWS * length;
      const int64_t left = first[e + 1] - t, apart = ROWS * length;
      const int m = left == 4 ? 2 : left < 3 ? (int)left : 3;
      if (m == 3) all_dots<Kind, 3>(tile, apart, w, length, ahead, sums);
      if (m == 2) all_dots<Kind, 2>(tile, apart, w, length, ahead, sums);
      if (m == 1) all_dots<Kind, 1>(tile, apart, w, length, ahead, sums);
      for (int j = 0; j < m; j++) then(t + j, sums[j]);
      t += m;
      ahead = 0;
    }
  }

  // act(gate x) * up x, or act(up x), of some columns; values are rounded where PyTorch's operations would round them.
  void raise(int64_t e, int64_t from, int64_t to) {
    const int64_t n_rows = gated ? 2 * hidden : hidden;
    const Entry* weight = up + e * n_rows * width;
    const int wide = gated ? STEP / 2 : STEP;  // columns of a step
    for (int64_t f = from; f < to; f += wide) {
      const Entry* w[STEP];
      for (int i = 0; i < STEP; i++) w[i] = weight + (gated && i >= wide ? hidden + f + i - wide : f + i) * width;
      products_of(e, tiles, width, w, f + wide < to ? wide * width : 0, [&](int64_t t, __m512* sums) {
        for (int i = 0; i < STEP; i++) sums[i] = Kind::rounded(sums[i]);
        __m512 made[STEP];
        for (int i = 0; i < wide; i++) {
          const __m512 active = relu ? _mm512_max_ps(_mm512_setzero_ps(), sums[i]) : silu(sums[i]);  // in this order NaN stays NaN
          made[i] = gated ? _mm512_mul_ps(Kind::rounded(active), sums[wide + i]) : active;
        }
        Kind::store_columns(products + (t * hidden + f) * ROWS, made, wide);
        if (!inner) return;
        transpose((__m512i*)sums);
        for (int64_t i = 0, n = filled(t); i < n; i++) {
          Entry* at = inner + (row(t) + i) * n_rows + f;
          gated ? Kind::store_halves(at, at + hidden, sums[i]) : Kind::store(at, sums[i]);
        }
      });
    }
  }

  void lower(int64_t e, int64_t from, int64_t to) {
    for (int64_t d = from; d < to; d += STEP) {
      const Entry* w[STEP];
      for (int i = 0; i < STEP; i++) w[i] = down + (e * width + d + i) * hidden;
      products_of(e, products, hidden, w, d + STEP < to ? STEP * hidden : 0, [&](int64_t t, __m512* sums) {
        transpose((__m512i*)sums);
        for (int64_t i = 0, n = filled(t); i < n; i++) Kind::store(y + (row(t) + i) * width + d, sums[i]);
      });
    }
  }

  void compute(int threads) {
    lay_out();
    const int64_t ups = (hidden + COLUMNS - 1) / COLUMNS, downs = (width + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < first[n_experts]; t++) fill(t);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < n_experts * ups; i++)
        raise(i / ups, i % ups * COLUMNS, std::min(hidden, (i % ups + 1) * COLUMNS));
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < n_experts * downs; i++)
        lower(i / downs, i % downs * COLUMNS, std::min(width, (i % downs + 1) * COLUMNS));
    }
  }
};

template <class Kind>
void compute(const void* rows, const int32_t* ends, const void* up, const void* down, void* tiles, void* products, void* inner,
             void* y, int64_t n_experts, int64_t width, int64_t hidden, int gated, int relu, int threads) {
  using Entry = typename Kind::Entry;
  Mixture<Kind>{(const Entry*)rows, (const Entry*)up, (const Entry*)down, ends, (Entry*)tiles, (Entry*)products, (Entry*)inner,
                (Entry*)y, n_experts, width, hidden, gated != 0, relu != 0, {}, {}}
      .compute(threads);
}

}  // namespace

extern "C" {

// rows (S, D), ends (E,) where the rows of each expert end, up (E, U, D), down (E, D, F); into y (S, D) and, unless it is null,
// inner (S, U), what the activation was applied to. Rows after the last end are left alone. `tiles` and `products` are room for
// 16 D and 16 F entries for every 16 rows or fewer of an expert. D is a multiple of 32, F of 16.
void experts_bf16(const void* rows, const int32_t* ends, const void* up, const void* down, void* tiles, void* products, void* inner,
                  void* y, int64_t n_experts, int64_t width, int64_t hidden, int gated, int relu, int threads) {
  compute<Bf16>(rows, ends, up, down, tiles, products, inner, y, n_experts, width, hidden, gated, relu, threads);
}

void experts_fp32(const void* rows, const int32_t* ends, const void* up, const void* down, void* tiles, void* products, void* inner,
                  void* y, int64_t n_experts, int64_t width, int64_t hidden, int gated, int relu, int threads) {
  compute<Fp32>(rows, ends, up, down, tiles, products, inner, y, n_experts, width, hidden, gated, relu, threads);
}
}
