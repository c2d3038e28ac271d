// Torch tensors in, raw pointers out: the only file here that knows Torch. Shapes are checked by the Python callers.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "factors.h"
#include "intervene.h"
#include "kmeans.h"
#include "pairs.h"
#include "scan.h"
#include "screen.h"
#include "screen_factors.h"
#include "statistics.h"

namespace binding {

using at::Tensor;

template <class Body>
void parallel(int64_t count, const Body& body) {
  at::parallel_for(0, count, 1, body);
}
constexpr auto parallel_for = [](int64_t count, auto&& body) { parallel(count, body); };

mfa::Shape shape_of(const Tensor& means, int64_t rank, bool per_component) {
  return {means.size(0), means.size(1), rank, per_component};
}

template <class T>
T* data(const Tensor& t) {
  return t.defined() ? t.data_ptr<T>() : nullptr;
}

// Fresh memory costs a page fault per 4 kB, as much as writing it several times over: ask for huge pages.
Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may not be taken
#endif
  return t;
}

Tensor zeros_like(const Tensor& like) { return allocate(like.sizes(), like.options()).zero_(); }

int64_t width(const Tensor& like) { return mfa::kVectorBytes / like.element_size(); }

// The kernels read raw memory: whatever is handed over must be what they take it for.
void check(const Tensor& t, at::IntArrayRef sizes, at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_contiguous() && t.device().is_cpu(), name, " must be contiguous and on the CPU");
}

void check_range(const Tensor& index, int64_t low, int64_t high, const char* name) {
  if (index.numel() == 0) return;
  const auto [least, largest] = at::aminmax(index);
  TORCH_CHECK_INDEX(least.item<int64_t>() >= low && largest.item<int64_t>() < high, name, " must be in [", low, ", ",
                    high, "), got values from ", least.item<int64_t>(), " to ", largest.item<int64_t>());
}

std::tuple<Tensor, Tensor, Tensor> factors(const Tensor& means, const Tensor& loadings, const Tensor& noise) {
  const auto shape = shape_of(means, loadings.size(2), noise.dim() == 2);
  const int64_t V = width(means);
  const auto type = means.scalar_type();
  check(means, {shape.components, shape.features}, type, "means");
  check(loadings, {shape.components, shape.features, shape.rank}, type, "loadings");
  if (shape.per_component)
    check(noise, {shape.components, shape.features}, type, "noise_variance");
  else
    check(noise, {shape.features}, type, "noise_variance");
  Tensor rows = allocate({shape.components, mfa::ceil_div(shape.features, V), shape.row_count(), V}, means.options());
  Tensor chol = at::empty({shape.components, shape.rank, shape.rank}, means.options());
  Tensor log_det = at::empty({shape.components}, means.options());
  AT_DISPATCH_FLOATING_TYPES(means.scalar_type(), "factors", [&] {
    mfa::factors<scalar_t>(shape, data<scalar_t>(means), data<scalar_t>(loadings), data<scalar_t>(noise),
                           data<scalar_t>(rows), data<scalar_t>(chol), data<scalar_t>(log_det), parallel_for);
  });
  return {rows, chol, log_det};
}

mfa::Shape shape_of_rows(const Tensor& rows, int64_t features, bool per_component) {
  return {rows.size(0), features, rows.size(2) - 1 - (per_component ? 1 : 0), per_component};
}

void check_scan(const mfa::Shape& shape, const Tensor& x, const Tensor& rows, const Tensor& lam) {
  const int64_t V = width(x);
  check(x, {x.size(0), shape.features}, x.scalar_type(), "x");
  check(rows, {shape.components, mfa::ceil_div(shape.features, V), shape.row_count(), V}, x.scalar_type(), "rows");
  check(lam, {shape.features}, x.scalar_type(), "scale");
}

void check_pairs(const mfa::Shape& shape, const Tensor& x, const Tensor& tokens, const Tensor& components,
                 const Tensor& chol) {
  check(tokens, {tokens.size(0)}, at::kLong, "tokens");
  check(components, {tokens.size(0)}, at::kInt, "components");
  check(chol, {shape.components, shape.rank, shape.rank}, x.scalar_type(), "cholesky");
  check_range(tokens, 0, x.size(0), "tokens");
  check_range(components, 0, shape.components, "components");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select(const Tensor& x, const Tensor& rows, const Tensor& constants,
                                                  const Tensor& lam, bool per_component,
                                                  double threshold, int64_t slots) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  check_scan(shape, x, rows, lam);
  check(constants, {shape.components}, x.scalar_type(), "constants");
  TORCH_CHECK_VALUE(slots >= 1, "slots must be at least 1, got ", slots);
  const int64_t N = x.size(0);
  Tensor log_prob = at::empty({N}, x.options());
  Tensor components = at::empty({N, slots}, x.options().dtype(at::kInt));
  Tensor logits = at::empty({N, slots}, x.options());
  Tensor counts = at::empty({N}, x.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "select", [&] {
    mfa::select<scalar_t>(shape, data<scalar_t>(x), N, data<scalar_t>(rows), data<scalar_t>(constants),
                          data<scalar_t>(lam), static_cast<scalar_t>(threshold), slots,
                          data<scalar_t>(log_prob), data<int32_t>(components), data<scalar_t>(logits),
                          data<int32_t>(counts), at::get_num_threads(), parallel_for);
  });
  return {log_prob, components, logits, counts};
}

// Stage 0 of screening (mfa_kernels/ops/screen/op.py): rows [K, p/V, R+1, V], radii and slack [K], lines [K, p] and
// line_terms [2, K], and, if they are to be kept, the projections [K, R+1, p]; `known` [K, R+1, at most p] are those on
// the first columns.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>> screen_marginals(
    const Tensor& means, const Tensor& loadings, const Tensor& cholesky, const Tensor& center, const Tensor& scale,
    const Tensor& projection, const std::optional<Tensor>& known, bool keep, double rounding, double base, double norm,
    const Tensor& middle, double up) {
  const auto shape = shape_of(means, loadings.size(2), false);
  const int64_t K = shape.components, D = shape.features, R = shape.rank, p = projection.size(1), V = width(means);
  const int64_t columns = known ? known->size(2) : 0, strip = std::max<int64_t>(V, mfa::kTileColumns);
  const auto type = means.scalar_type();
  check(means, {K, D}, type, "means");
  check(loadings, {K, D, R}, type, "loadings");
  check(cholesky, {K, R, R}, type, "cholesky");
  check(center, {D}, type, "center");
  check(scale, {D}, at::kDouble, "scale");
  check(projection, {D, p}, at::kDouble, "projection");
  check(middle, {p}, at::kDouble, "middle");
  TORCH_CHECK_VALUE(p >= 1 && p % strip == 0, "projection must have a multiple of ", strip, " columns, got ", p);
  if (known) check(*known, {K, R + 1, columns}, at::kDouble, "known");
  TORCH_CHECK_VALUE(columns <= p && columns % strip == 0, "known must have a multiple of ", strip, " columns up to ", p,
                    ", got ", columns);
  Tensor rows = allocate({K, p / V, R + 1, V}, means.options());
  Tensor radii = at::empty({K}, means.options()), slack = at::empty({K}, means.options());
  Tensor lines = allocate({K, p}, means.options()), line_terms = at::empty({2, K}, means.options());
  std::optional<Tensor> kept;
  if (keep) kept = allocate({K, R + 1, p}, projection.options());
  AT_DISPATCH_FLOATING_TYPES(type, "screen_marginals", [&] {
    mfa::Marginals<scalar_t> job{};
    job.means = data<scalar_t>(means), job.loadings = data<scalar_t>(loadings);
    job.cholesky = data<scalar_t>(cholesky), job.center = data<scalar_t>(center);
    job.scale = data<double>(scale), job.projection = data<double>(projection), job.features = p;
    if (known) job.known = data<double>(*known), job.columns = columns;
    if (kept) job.kept = data<double>(*kept);
    job.rounding = rounding, job.base = base, job.norm = norm, job.up = up;
    job.middle = data<double>(middle);
    job.rows = data<scalar_t>(rows), job.radii = data<scalar_t>(radii), job.slack = data<scalar_t>(slack);
    job.lines = data<scalar_t>(lines), job.offsets = data<scalar_t>(line_terms), job.shares = job.offsets + K;
    mfa::marginals(shape, job, parallel_for);
  });
  return {rows, radii, slack, lines, line_terms, kept};
}

// The tensors of a Screen (mfa_kernels/ops/screen/op.py) and the constants of its mixture.
template <class T>
mfa::Screen<T> screen_of(const mfa::Shape& shape, const Tensor& x, const Tensor& constants, const Tensor& center,
                         const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii,
                         const Tensor& slack, const Tensor& lines, const Tensor& line_terms, double exact_slack) {
  const auto type = x.scalar_type();
  const int64_t K = shape.components, p = basis.size(1), V = width(x);
  check(basis, {shape.features, p}, type, "basis");
  TORCH_CHECK_VALUE(p >= 1 && p % V == 0 && p % 8 == 0, "basis must have a multiple of ", std::max<int64_t>(V, 8),
                    " columns, got ", p);
  check(center, {shape.features}, type, "center");
  check(marginal_rows, {K, p / V, shape.row_count(), V}, type, "marginal_rows");
  check(constants, {K}, type, "constants");
  check(log_det, {K}, type, "log_det");
  check(radii, {K}, type, "radii");
  check(slack, {K}, type, "slack");
  const bool with_lines = lines.size(0) > 0;
  if (with_lines) check(lines, {K, p}, type, "lines");
  check(line_terms, {2, with_lines ? K : 0}, type, "line_terms");
  const T* terms = with_lines ? data<T>(line_terms) : nullptr;
  return {p, data<T>(basis), data<T>(center), data<T>(marginal_rows), data<T>(constants), data<T>(log_det),
          data<T>(radii), data<T>(slack), with_lines ? data<T>(lines) : nullptr, terms, with_lines ? terms + K : nullptr,
          static_cast<T>(exact_slack)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_screened(
    const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam, const Tensor& center,
    const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii, const Tensor& slack,
    const Tensor& lines, const Tensor& line_terms, bool batches_by_lines, double exact_slack, double threshold,
    int64_t slots) {
  const auto shape = shape_of_rows(rows, x.size(1), false);
  check_scan(shape, x, rows, lam);
  TORCH_CHECK_VALUE(slots >= 1, "slots must be at least 1, got ", slots);
  const int64_t N = x.size(0);
  Tensor log_prob = at::empty({N}, x.options());
  Tensor components = at::empty({N, slots}, x.options().dtype(at::kInt));
  Tensor logits = at::empty({N, slots}, x.options());
  Tensor counts = at::empty({N}, x.options().dtype(at::kInt));
  Tensor dropped = at::empty({N}, x.options());
  Tensor evaluated = at::empty({N}, x.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "select_screened", [&] {
    auto screen = screen_of<scalar_t>(shape, x, constants, center, basis, marginal_rows, log_det, radii, slack, lines,
                                      line_terms, exact_slack);
    if (!batches_by_lines && N > mfa::kFewScreened) screen.lines = nullptr;
    const mfa::Selection<scalar_t> out{data<scalar_t>(log_prob), data<int32_t>(components), data<scalar_t>(logits),
                                       data<int32_t>(counts)};
    mfa::select_screened<scalar_t>(shape, screen, data<scalar_t>(x), N, data<scalar_t>(rows), data<scalar_t>(constants),
                                   data<scalar_t>(lam), static_cast<scalar_t>(threshold), slots, out,
                                   data<scalar_t>(dropped), data<int32_t>(evaluated), at::get_num_threads(),
                                   parallel_for);
  });
  return {log_prob, components, logits, counts, dropped, evaluated};
}

Tensor screen_bounds(const Tensor& x, const Tensor& constants, const Tensor& lam, const Tensor& center,
                     const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii,
                     const Tensor& slack, const Tensor& lines, const Tensor& line_terms, bool by_lines) {
  const mfa::Shape shape{constants.size(0), x.size(1), marginal_rows.size(2) - 1, false};
  check(x, {x.size(0), shape.features}, x.scalar_type(), "x");
  check(lam, {shape.features}, x.scalar_type(), "scale");
  Tensor out = allocate({x.size(0), shape.components}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "screen_bounds", [&] {
    const auto screen =
        screen_of<scalar_t>(shape, x, constants, center, basis, marginal_rows, log_det, radii, slack, lines, line_terms,
                            0);
    TORCH_CHECK_VALUE(!by_lines || screen.lines, "by_lines needs a screen that has lines");
    mfa::bounds<scalar_t>(shape, screen, data<scalar_t>(x), x.size(0), data<scalar_t>(lam), by_lines,
                          data<scalar_t>(out), at::get_num_threads(), parallel_for);
  });
  return out;
}

Tensor dense(const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam,
             bool per_component) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  check_scan(shape, x, rows, lam);
  check(constants, {shape.components}, x.scalar_type(), "constants");
  Tensor out = allocate({shape.components, x.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dense", [&] {
    mfa::dense<scalar_t>(shape, data<scalar_t>(x), x.size(0), data<scalar_t>(rows), data<scalar_t>(constants),
                         data<scalar_t>(lam), data<scalar_t>(out), at::get_num_threads(),
                         parallel_for);
  });
  return out;
}

Tensor latents(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& rows, const Tensor& chol,
               const Tensor& lam, bool per_component) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  check_scan(shape, x, rows, lam);
  check_pairs(shape, x, tokens, components, chol);
  Tensor out = at::empty({tokens.size(0), shape.rank}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "latents", [&] {
    mfa::latents<scalar_t>(shape, data<scalar_t>(x), data<int64_t>(tokens), data<int32_t>(components), tokens.size(0),
                           data<scalar_t>(rows), data<scalar_t>(chol), data<scalar_t>(lam),
                           data<scalar_t>(out), parallel_for);
  });
  return out;
}

// Adds to the tensors given; an undefined one (None) is not computed.
void backward(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& weights,
              const Tensor& rows, const Tensor& chol, const Tensor& lam, bool per_component,
              const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_means,
              const std::optional<Tensor>& grad_loadings, const std::optional<Tensor>& grad_noise,
              const std::optional<Tensor>& grad_log_weights) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  check_scan(shape, x, rows, lam);
  check_pairs(shape, x, tokens, components, chol);
  check(weights, {tokens.size(0)}, x.scalar_type(), "weights");
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "backward", [&] {
    auto pointer = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<scalar_t>() : nullptr; };
    const mfa::Gradients<scalar_t> grad{pointer(grad_x), pointer(grad_means), pointer(grad_loadings),
                                        pointer(grad_noise), pointer(grad_log_weights)};
    mfa::backward<scalar_t>(shape, data<scalar_t>(x), data<int64_t>(tokens), data<int32_t>(components),
                            data<scalar_t>(weights), tokens.size(0), data<scalar_t>(rows), data<scalar_t>(chol),
                            data<scalar_t>(lam), grad, parallel_for);
  });
}

Tensor decode(const Tensor& components, const Tensor& responsibilities, const Tensor& latents, const Tensor& means,
              const Tensor& loadings) {
  const auto shape = shape_of(means, loadings.size(2), false);
  const auto type = means.scalar_type();
  check(means, {shape.components, shape.features}, type, "means");
  check(loadings, {shape.components, shape.features, shape.rank}, type, "loadings");
  check(components, {components.size(0), components.size(1)}, at::kInt, "components");
  check(responsibilities, components.sizes(), type, "responsibilities");
  check(latents, {components.size(0), components.size(1), shape.rank}, type, "latents");
  check_range(components, -1, shape.components, "components");
  Tensor out = at::empty({components.size(0), shape.features}, means.options());
  AT_DISPATCH_FLOATING_TYPES(means.scalar_type(), "decode", [&] {
    mfa::decode<scalar_t>(shape, data<int32_t>(components), data<scalar_t>(responsibilities), data<scalar_t>(latents),
                          components.size(0), components.size(1), data<scalar_t>(means), data<scalar_t>(loadings),
                          data<scalar_t>(out), parallel_for);
  });
  return out;
}

// Adds to the outputs, which are double whatever the dtype of x.
void statistics(const Tensor& x, const Tensor& components, const Tensor& weights, const Tensor& rows,
                const Tensor& chol, const Tensor& lam, bool per_component, const Tensor& mass, const Tensor& shift,
                const Tensor& latent, const Tensor& second, const Tensor& cross, const Tensor& squares) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  const int64_t K = shape.components, D = shape.features, R = shape.rank;
  check_scan(shape, x, rows, lam);
  check(components, {x.size(0), components.size(1)}, at::kInt, "components");
  check(weights, components.sizes(), x.scalar_type(), "weights");
  check(chol, {K, R, R}, x.scalar_type(), "cholesky");
  check_range(components, -1, K, "components");
  check(mass, {K}, at::kDouble, "mass");
  check(shift, {K, D}, at::kDouble, "shift");
  check(latent, {K, R}, at::kDouble, "latent");
  check(second, {K, R, R}, at::kDouble, "second");
  check(cross, {K, R, D}, at::kDouble, "cross");
  if (per_component)
    check(squares, {K, D}, at::kDouble, "squares");
  else
    check(squares, {D}, at::kDouble, "squares");
  const mfa::Sums out{data<double>(mass),   data<double>(shift), data<double>(latent),
                      data<double>(second), data<double>(cross), data<double>(squares)};
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "statistics", [&] {
    mfa::statistics<scalar_t>(shape, data<scalar_t>(x), data<int32_t>(components), data<scalar_t>(weights), x.size(0),
                              components.size(1), data<scalar_t>(rows), data<scalar_t>(chol), data<scalar_t>(lam),
                              out, parallel_for);
  });
}

// K-means: x [N, D] against centroids [K, D]; basis [D, P] with projected [K, P], or neither.
std::tuple<Tensor, Tensor, int64_t> nearest(const Tensor& x, const Tensor& centroids, const Tensor& center,
                                            const std::optional<Tensor>& basis, const std::optional<Tensor>& projected,
                                            double slack) {
  const auto type = x.scalar_type();
  const int64_t N = x.size(0), K = centroids.size(0), D = centroids.size(1), V = width(x);
  check(x, {N, D}, type, "x");
  check(centroids, {K, D}, type, "centroids");
  check(center, {D}, type, "center");
  const int64_t P = basis ? basis->size(1) : 0;
  if (basis) {
    TORCH_CHECK_VALUE(P >= V && P % V == 0, "basis must have a multiple of ", V, " columns, got ", P);
    TORCH_CHECK_VALUE(projected, "projected is missing");
    check(*basis, {D, P}, type, "basis");
    check(*projected, {K, P}, type, "projected");
  }
  Tensor owner = at::empty({N}, x.options().dtype(at::kLong));
  Tensor distance = at::empty({N}, x.options());
  int64_t pairs = 0;
  AT_DISPATCH_FLOATING_TYPES(type, "nearest", [&] {
    using T = scalar_t;
    const T* c = data<T>(centroids);
    const mfa::Centroids<T> all{K, D, c, data<T>(center), basis ? P : D, basis ? data<T>(*basis) : nullptr,
                                basis ? data<T>(*projected) : c, static_cast<T>(slack)};
    pairs = mfa::nearest<T>(all, data<T>(x), N, data<int64_t>(owner), data<T>(distance), parallel_for);
  });
  return {owner, distance, pairs};
}

// Adds to sums [K, D], mass [K] and inertia [K].
void cluster_sums(const Tensor& x, const Tensor& center, const Tensor& owner, const Tensor& distance,
                  const std::optional<Tensor>& weights, const Tensor& sums, const Tensor& mass, const Tensor& inertia) {
  const int64_t N = x.size(0), D = x.size(1), K = sums.size(0);
  check(x, {N, D}, x.scalar_type(), "x");
  check(center, {D}, x.scalar_type(), "center");
  check(owner, {N}, at::kLong, "owner");
  check(distance, {N}, x.scalar_type(), "distance");
  check(sums, {K, D}, at::kDouble, "sums");
  check(mass, {K}, at::kDouble, "mass");
  check(inertia, {K}, at::kDouble, "inertia");
  if (weights) check(*weights, {N}, at::kDouble, "weights");
  check_range(owner, 0, K + 1, "owner");
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "cluster_sums", [&] {
    mfa::cluster_sums<scalar_t>(data<scalar_t>(x), N, D, data<scalar_t>(center), data<int64_t>(owner),
                                data<scalar_t>(distance), weights ? data<double>(*weights) : nullptr, K,
                                data<double>(sums), data<double>(mass), data<double>(inertia), parallel_for);
  });
}

// Whether a tensor may be given to a batch of B rows and T tokens: (B', S, width) with B' dividing B, S 1 or T.
template <class T>
mfa::PerToken<T> per_token(const std::optional<Tensor>& t, int64_t batch, int64_t tokens, int64_t width,
                           const char* name) {
  if (!t) return {nullptr, 1, 1, width};
  const int64_t rows = t->size(0), steps = t->dim() > 1 ? t->numel() / std::max<int64_t>(1, rows * width) : 1;
  TORCH_CHECK_VALUE(rows >= 1 && batch % rows == 0 && (steps == 1 || steps == tokens) &&
                        t->numel() == rows * steps * width,
                    name, " does not fit a batch of ", batch, " rows of ", tokens, " tokens, got ", t->sizes());
  check(*t, t->sizes(), c10::CppTypeToScalarType<T>::value, name);
  return {t->data_ptr<T>(), rows, steps, width};
}

std::tuple<Tensor, Tensor> intervene(const Tensor& hidden, const Tensor& coefficients, const Tensor& shift,
                                     const Tensor& rules, const Tensor& thresholds,
                                     const std::optional<Tensor>& latents, const std::optional<Tensor>& chosen,
                                     const std::optional<Tensor>& passed, const std::optional<Tensor>& log_prob,
                                     const std::optional<Tensor>& components, const std::optional<Tensor>& logits,
                                     const std::optional<Tensor>& counts, const std::optional<Tensor>& rows,
                                     const std::optional<Tensor>& chol, const std::optional<Tensor>& lam,
                                     bool per_component, bool spreads) {
  const int64_t B = hidden.size(0), N = hidden.size(1), D = hidden.size(2), R = chol ? chol->size(2) : 0;
  const auto type = thresholds.scalar_type();
  const int64_t slots = log_prob ? components->size(1) : 0;
  check(hidden, {B, N, D}, hidden.scalar_type(), "hidden");
  if (log_prob) {
    check(*log_prob, {B * N}, type, "log_prob");
    check(*components, {B * N, slots}, at::kInt, "components");
    check(*logits, {B * N, slots}, type, "logits");
    check(*counts, {B * N}, at::kInt, "counts");
  }
  mfa::Shape shape{0, D, R, per_component};
  if (rows) {
    TORCH_CHECK_VALUE(log_prob, "log_prob and the active components must be given where rows are");
    shape = shape_of_rows(*rows, D, per_component);
    const int64_t V = width(thresholds);
    check(*rows, {shape.components, mfa::ceil_div(D, V), shape.row_count(), V}, type, "rows");
    check(*chol, {shape.components, R, R}, type, "cholesky");
    check(*lam, {D}, type, "scale");
    check_range(*components, -1, shape.components, "components");
  }
  Tensor out = at::empty({B, N, D}, hidden.options());
  Tensor tally = at::empty({B, N, 3}, thresholds.options());
  AT_DISPATCH_FLOATING_TYPES(type, "intervene", [&] {
    using T = scalar_t;
    auto pointer = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<T>() : nullptr; };
    auto index = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<int32_t>() : nullptr; };
    const mfa::Seen<T> seen{slots,         pointer(log_prob), index(components), pointer(logits),
                            index(counts), pointer(rows),     pointer(chol),     pointer(lam)};
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "intervene", [&] {
      using H = scalar_t;
      using A = std::conditional_t<std::is_same_v<H, double>, double, T>;
      const mfa::Edit<T, A> edit{B,
                                 N,
                                 per_token<A>(coefficients, B, N, 3, "coefficients"),
                                 per_token<A>(shift, B, N, D, "shift"),
                                 per_token<int32_t>(rules, B, 1, 3, "rules"),
                                 per_token<T>(thresholds, B, 1, 1, "thresholds"),
                                 per_token<T>(latents, B, N, R, "latents"),
                                 per_token<bool>(chosen, B, N, 1, "chosen"),
                                 per_token<bool>(passed, B, N, 1, "passed"),
                                 spreads};
      mfa::intervene<H, T, A>(shape, edit, seen, data<H>(hidden), data<H>(out), data<T>(tally), parallel_for);
    });
  });
  return {out, tally};
}

}  // namespace binding

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("vector_bytes") = mfa::kVectorBytes;
  const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("zeros_like", &binding::zeros_like, no_gil);
  m.def("factors", &binding::factors, no_gil);
  m.def("select", &binding::select, no_gil);
  m.def("screen_marginals", &binding::screen_marginals, no_gil);
  m.def("select_screened", &binding::select_screened, no_gil);
  m.def("screen_bounds", &binding::screen_bounds, no_gil);
  m.def("dense", &binding::dense, no_gil);
  m.def("latents", &binding::latents, no_gil);
  m.def("backward", &binding::backward, no_gil);
  m.def("decode", &binding::decode, no_gil);
  m.def("statistics", &binding::statistics, no_gil);
  m.def("nearest", &binding::nearest, no_gil);
  m.def("cluster_sums", &binding::cluster_sums, no_gil);
  m.def("intervene", &binding::intervene, no_gil);
}
