// SIMD vectors by the compiler's vector extension: one source for AVX-512, AVX2, NEON and SSE.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// Vectors of as many lanes in double precision.
template <class T>
struct Wide {
  typedef double Vec __attribute__((vector_size(kWidth<T> * sizeof(double))));
};

template <class T>
inline typename Wide<T>::Vec widen(Vec<T> v) {
  return __builtin_convertvector(v, typename Wide<T>::Vec);
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
#endif
#endif

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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mfa
