// Binds scan.h and candidate_scan.h to PyTorch.
#include "candidate_scan.h"
#include "scan_bindings.h"

namespace binding {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan(const Tensor& x, const Tensor& rows, const Tensor& constants,
                                                        const Tensor& lam, bool per_component, double threshold,
                                                        int64_t slots, bool keep) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  const ActiveTensors out(x, slots);
  AllLogits all(x, shape.components, keep);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan", [&] {
    const auto in = scan_input<scalar_t>(shape, x, rows, constants, lam);
    const auto pairs = out.pairs<scalar_t>(threshold);
    const bool wanted = keep && (in.tokens < mfa::kCrowdTokens || mfa::crowded(in, pairs, parallel_for));
    mfa::scan(in, pairs, parallel_for, wanted ? all.room<scalar_t>() : nullptr);
  });
  return {out.log_prob, out.components, out.logits, out.counts, all.logits};
}

Tensor dense(const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam, bool per_component) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  Tensor out = allocate({shape.components, x.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dense", [&] {
    mfa::dense(scan_input<scalar_t>(shape, x, rows, constants, lam), data<scalar_t>(out), parallel_for);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_candidates(const ScanCandidates& a) {
  const auto shape = shape_of_rows(a.rows, a.x.size(1), a.per_component);
  check(a.candidates, {a.x.size(0), a.candidates.size(1)}, at::kInt, "candidates");
  check_range(a.candidates, -1, shape.components, "candidates");
  const ActiveTensors out(a.x, a.slots);
  Tensor all = empty(a.candidates.sizes(), a.x.options());
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "scan_candidates", [&] {
    mfa::scan_candidates(scan_input<scalar_t>(shape, a.x, a.rows, a.constants, a.lam), data<int32_t>(a.candidates),
                         a.candidates.size(1), out.pairs<scalar_t>(a.threshold), data<scalar_t>(all), parallel_for);
  });
  return {out.log_prob, out.components, out.logits, out.counts, all};
}

}  // namespace binding
