// SIMD vectors by the compiler's vector extension: one source for AVX-512, AVX2, NEON and SSE.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace mfa {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class T>
struct Simd {
  // Alignment is that of T, because a caller's tensors may start anywhere.
  typedef T Vec __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int width = kVectorBytes / sizeof(T);
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
constexpr int kWidth = Simd<T>::width;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}

// a in every lane. Subtracting +0 changes no value, so compilers leave it out, and read the lanes from memory. They may
// not leave out the addition of 0, which turns -0 into 0; that, and a broadcast between registers, took the place of two
// multiply-adds on processors whose ports do both.
template <class T>
inline Vec<T> broadcast(T a) {
  return a - Vec<T>{};
}

// Asks for `count` values from p on, which are needed soon: a processor does not guess where the next component begins.
template <class T>
inline void prefetch(const T* p, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + i);
}

// A bit for every lane where a is not below b, as where either is NaN.
inline uint64_t not_below(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
#elif defined(__AVX__)
  return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < kWidth<float>; ++lane) bits |= uint64_t(!(a[lane] < b[lane])) << lane;
  return bits;
#endif
}

// Vectors of as many lanes in double precision.
template <class T>
struct Wide {
  typedef double Vec __attribute__((vector_size(kWidth<T> * sizeof(double))));
};

template <class T>
inline typename Wide<T>::Vec widen(Vec<T> v) {
  return __builtin_convertvector(v, typename Wide<T>::Vec);
}

// As many lanes of T as a vector of double has: what is computed in double precision is read and written by these.
template <class T>
struct Narrow {
  typedef T Vec __attribute__((vector_size(kWidth<double> * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <class T>
inline Vec<double> load_wide(const T* p) {
  return __builtin_convertvector(*reinterpret_cast<const typename Narrow<T>::Vec*>(p), Vec<double>);
}

template <class T>
inline void store_narrow(T* p, Vec<double> v) {
  *reinterpret_cast<typename Narrow<T>::Vec*>(p) = __builtin_convertvector(v, typename Narrow<T>::Vec);
}

template <class T>
inline T horizontal_sum(Vec<T> v) {
  // Pairwise: the error grows with log2(width), and the order is fixed.
  T lane[kWidth<T>];
  std::memcpy(lane, &v, sizeof lane);
  for (int step = kWidth<T> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MFA_SHUFFLES
// Adds lanes that differ in bit `Step` of their index: those of a where the bit is clear, those of b where it is set.
template <class T, int Step, int... J>
inline Vec<T> add_across(Vec<T> a, Vec<T> b, std::integer_sequence<int, J...>) {
  constexpr int V = kWidth<T>;
  return __builtin_shufflevector(a, b, (J & Step ? V + J : J)...) +
         __builtin_shufflevector(a, b, (J & Step ? V + (J ^ Step) : J ^ Step)...);
}

// Exchanges lanes of a where bit `Step` of their index is set for lanes of b where it is clear.
template <class T, int Step, int... J>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, J...>) {
  constexpr int V = kWidth<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, (J & Step ? V + (J ^ Step) : J)...);
  b = __builtin_shufflevector(a, b, (J & Step ? V + J : J ^ Step)...);
  a = low;
}
#endif
#endif

// Transposes V vectors, aligned to kVectorBytes: lane j of vector i changes places with lane i of vector j.
template <class T>
inline void transpose(Vec<T>* v) {
  constexpr int V = kWidth<T>;
#ifdef MFA_SHUFFLES
  auto exchange_all = [&]<int Step>(auto& self, std::integral_constant<int, Step>) -> void {
    if constexpr (Step < V) {
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i)
        if (!(i & Step)) exchange<T, Step>(v[i], v[i + Step], std::make_integer_sequence<int, V>{});
      self(self, std::integral_constant<int, 2 * Step>{});
    }
  };
  exchange_all(exchange_all, std::integral_constant<int, 1>{});
#else
  for (int i = 0; i < V; ++i)
    for (int j = 0; j < i; ++j) {
      const T own = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = own;
    }
#endif
}

// out [V]: the sums of the lanes of V vectors [V, V].
template <class T>
inline void sums_of_lanes(const T* vectors, T* out) {
  constexpr int V = kWidth<T>;
#ifdef MFA_SHUFFLES
  Vec<T> v[V];
  for (int i = 0; i < V; ++i) v[i] = load(vectors + i * V);
  auto halve = [&]<int Step>(auto& self, std::integral_constant<int, Step>) -> void {
    if constexpr (Step < V) {
#pragma GCC unroll 8
      for (int i = 0; i < V / (2 * Step); ++i)
        v[i] = add_across<T, Step>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, V>{});
      self(self, std::integral_constant<int, 2 * Step>{});
    }
  };
  halve(halve, std::integral_constant<int, 1>{});
  store<T>(out, v[0]);
#else
  for (int i = 0; i < V; ++i) out[i] = horizontal_sum<T>(load(vectors + i * V));
#endif
}

// Calls body with n, 1 to N, as a constant.
template <int N, class Body>
void with_constant(int64_t n, Body&& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    ((n == I + 1 ? body(std::integral_constant<int, I + 1>{}) : void()), ...);
  }(std::make_integer_sequence<int, N>{});
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mfa
