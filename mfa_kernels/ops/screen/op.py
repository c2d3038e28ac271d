"""Screening: `screen` prepares bounds, `choose` picks their width, `scan` computes what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mfa_kernels.ops.common import configs, cpp, first_use, trust
from mfa_kernels.ops.common.register import operator
from mfa_kernels.ops.scan import portable, spot_check
from mfa_kernels.ops.scan.op import log_prob
from mfa_kernels.ops.scan.types import ActivePairs, activity_threshold
from mfa_kernels.ops.screen.basis import basis as choose_basis
from mfa_kernels.ops.screen.cost import DENSE_SHARE, modelled_cost
from mfa_kernels.ops.screen.rounding import logit_slack
from mfa_kernels.ops.screen.stage_0 import bound_terms
from mfa_kernels.ops.screen.types import AnyScreen, Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.op import factorize
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury

WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""The p that `choose` tries."""


_COUNTED = 512  # components on which `choose` counts


def serves(woodbury: Woodbury) -> bool:
    """True where kernels screen with these terms: C++ on a CPU, or Triton."""
    shared = not woodbury.per_component
    return shared and (woodbury.backend == "cpp" or (bool(woodbury.scan) and woodbury.scan[0].numel() > 0))


def _triton() -> ModuleType:
    from mfa_kernels.ops.screen import triton_screen

    return triton_screen


def default_features(features: int) -> int:
    """p where nothing was measured: an eighth of D, at least 48 and at most D, in multiples of 16."""
    return min(max(48, -(-features // 128) * 16), features // 16 * 16)


def screen(
    parameters: Parameters, woodbury: Woodbury, features: int | None = None, basis: Tensor | None = None
) -> AnyScreen:
    """Stage 0 of screening: K D p (R + 1) multiply-adds in float64, and an eigenproblem unless a basis is given.

    PyTorch's BLAS has a hand in it, so its last bits may depend on the number of threads; those of its scans do not.

    Args:
        parameters: float32 (or float64 on a CPU); noise per component is not screened.
        woodbury: of these parameters.
        features: p, a multiple of 16 and at most D; None takes `default_features`.
        basis: Q (D, p), any matrix with nearly orthonormal columns: that of a step before serves as well; None
            computes the one that suits these parameters.

    Raises:
        ValueError: noise per component, or p that is not a multiple of 16 between 16 and D.
    """
    means, loadings, noise_variance, log_weights = parameters
    if noise_variance.dim() != 1:
        raise ValueError(f"noise_variance must have shape (D,) for screening, got {tuple(noise_variance.shape)}")
    if not serves(woodbury):
        raise ValueError("woodbury must be that of the C++ kernels or of Triton for screening: no other backend has it")
    width = features if features is not None else default_features(means.shape[1])
    if basis is not None:
        if basis.dim() != 2 or basis.shape[0] != means.shape[1]:
            raise ValueError(f"basis must have shape (D, p) = ({means.shape[1]}, p), got {tuple(basis.shape)}")
        width = basis.shape[1]
    if not 16 <= width <= means.shape[1] or width % 16:
        raise ValueError(f"features must be a multiple of 16 between 16 and D = {means.shape[1]}, got {width}")
    with torch.no_grad():
        q = choose_basis(woodbury, log_weights.exp(), width) if basis is None else basis
        if woodbury.backend != "cpp":
            return _triton().screen(means, loadings, noise_variance, woodbury, q.to(means.dtype))
        q = q.float().contiguous()
        exact = logit_slack(means.shape[1], loadings.shape[2], torch.finfo(means.dtype).eps / 2)
        return Screen(*bound_terms(Parameters(*parameters), woodbury, q), exact * (1 + 1e-6))


def refresh(previous: AnyScreen, parameters: Parameters, woodbury: Woodbury) -> AnyScreen:
    """The screen of parameters that have moved, on the coordinates of another: stage 0 without an eigenproblem, for
    every training step. `modelled_cost` says whether a step should; other arguments as `screen` takes them."""
    return screen(parameters, woodbury, basis=previous.basis)


def choose(x: Tensor, parameters: Parameters, woodbury: Woodbury) -> AnyScreen | None:
    """The screen that costs least on some tokens; None where the dense scan costs less, as it does with noise per
    component. Counts decide, not times: the same tokens and parameters give the same choice, on as many threads.

    Args:
        x: (N, D), a few hundred tokens like those to come, in the dtype of the parameters.
        parameters, woodbury: as `screen` takes them.
    """
    step = 16 if woodbury.backend == "cpp" else 64  # features that a tile of Triton's scan reads at least
    widths = [width for width in WIDTHS if 2 * width <= parameters[0].shape[1] and width % step == 0]
    if not serves(woodbury) or not widths:
        return None
    with torch.no_grad():
        return _choose(x, parameters, woodbury, widths)


def _choose(x: Tensor, parameters: Parameters, woodbury: Woodbury, widths: list[int]) -> AnyScreen | None:
    means, loadings, noise_variance, log_weights = parameters
    count, features, rank = loadings.shape
    constants = woodbury.constants(log_weights)
    threshold = activity_threshold(count, means.dtype)
    basis = choose_basis(woodbury, log_weights.exp(), widths[-1]).to(means.dtype)
    on_cpu = woodbury.backend == "cpp"
    counted = _Counted(x, parameters, woodbury) if on_cpu else None
    best, least = None, 1.0  # in units of the dense scan in float32
    for width in widths:
        sizes = count, features, rank, width
        if modelled_cost(torch.ones(1), *sizes, on_cpu=on_cpu) >= least:
            break
        if counted is not None:
            evaluated = counted.evaluated(basis[:, :width])
        else:
            candidate = _triton().screen(means, loadings, noise_variance, woodbury, basis[:, :width])
            evaluated = scan(x, woodbury, constants, candidate, threshold, 1).evaluated
        cost = modelled_cost(evaluated, *sizes, on_cpu=on_cpu)
        if cost < least:
            best, least = width, cost
    return None if best is None else screen(parameters, woodbury, basis=basis[:, :best])


class _Counted:
    """How many components bounds leave of some tokens: counted on `_COUNTED` components, for all."""

    def __init__(self, x: Tensor, parameters: Parameters, woodbury: Woodbury) -> None:
        count = len(parameters.means)
        some = torch.arange(count) if count <= _COUNTED else torch.arange(_COUNTED) * count // _COUNTED
        means, loadings, noise_variance, log_weights = parameters
        active = log_prob(x, *parameters, woodbury, 1)
        self.x, self.share = x, count / len(some)
        self.bars = active.logits[:, :1] - activity_threshold(count, means.dtype)
        self.parameters = Parameters(means[some], loadings[some], noise_variance, log_weights[some])
        self.woodbury = factorize(*self.parameters[:3], woodbury.center)
        self.constants = self.woodbury.constants(self.parameters.log_weights)
        self.most = count // DENSE_SHARE

    def evaluated(self, basis: Tensor) -> Tensor:
        """As a scan returns it, about: (N,)."""
        found = screen(self.parameters, self.woodbury, basis=basis)
        assert isinstance(found, Screen)
        left = ~(bounds(self.x, self.woodbury, self.constants, found) < self.bars)
        evaluated = 1 + self.share * left.sum(-1)
        return torch.where(evaluated > self.most, -1, evaluated)


def scan(
    x: Tensor, woodbury: Woodbury, constants: Tensor, screen: AnyScreen, threshold: float, slots: int
) -> ScreenedPairs:
    """Runs stage 1 through the bounds, without gradients.

    Args:
        x: (N, D), any float dtype; it is brought to the dtype of the Woodbury terms.
        woodbury: shared noise.
        constants: `woodbury.constants(log_weights)`, (K,).
        screen: of the same parameters.
        threshold: nats below the best logit at which a component stops being active.
        slots: S, the most active components kept per token.
    """
    if not isinstance(screen, Screen):
        x = (x if x.dtype in (torch.bfloat16, torch.float16) else x.to(constants.dtype)).contiguous()

        from mfa_kernels.ops.common import triton_probe

        def plain() -> ScreenedPairs:
            active = ActivePairs(*portable.scan(x.to(constants.dtype), woodbury, constants, threshold, slots))
            return ScreenedPairs(active, torch.zeros_like(active.log_prob), torch.full_like(active.counts, -1))

        def error(found: ScreenedPairs, before: Sequence[Tensor]) -> float | None:
            spots = spot_check.of_scan(found.active, x, woodbury, constants)
            return None if spots is None else max(spots, triton_probe.of_device(x.device, x.shape[1]))

        trial = first_use.Trial(
            lambda: _triton().scan(x, woodbury, constants, screen, threshold, slots),
            plain,
            error,
            careful=True,
        )
        tokens, rank = configs.bucket(min(len(x), 128)), woodbury.cholesky.shape[-1]
        shape = tokens, configs.bucket(len(constants)), x.shape[1], screen.basis.shape[1], rank, x.dtype, slots > 16
        return first_use.served("screened scan", x, shape, trial)
    *active, dropped, evaluated = torch.ops.mfa_kernels.select_screened(
        x, woodbury.rows, constants, woodbury.scale, *screen, threshold, slots
    )
    return ScreenedPairs(ActivePairs(*active), dropped, evaluated)


def bounds(x: Tensor, woodbury: Woodbury, constants: Tensor, screen: Screen) -> Tensor:
    """The upper bounds of all logits that `scan` works from, (N, K) float32; arguments as there, in one dtype."""
    return cpp.library().screen_bounds(x.contiguous(), constants, woodbury.scale, *screen[:5])


_check = trust.checker(
    "select_screened",
    {
        "x": "any(N, D)", "rows": "scale(K, -(-D // lanes[scale_dtype]), Q, lanes[scale_dtype])",
        "constants": "scale(K)", "scale": "real(D)", "center": "scale(D)", "basis": "float32(D, P)",
        "bound_rows": "int8(K, -(-D // 64) + (Q - 1) * (-(-P // 64)), 64)", "starts": "int32(K, Q)",
        "terms": "float32(K, 2 * Q + 11)",
    },
    last=("bound_rows", "rows", "constants", "x"),
)  # fmt: skip


def _fake_scan(given):
    active = ActivePairs.empty(given.x.shape[0], given.slots, given.rows)
    return *active, torch.empty_like(active.log_prob), torch.empty_like(active.counts)


@operator(
    "select_screened",
    "(Tensor x, Tensor rows, Tensor constants, Tensor scale, Tensor center, Tensor basis, Tensor bound_rows,"
    " Tensor starts, Tensor terms, float exact_slack, float threshold, int slots)"
    " -> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts, Tensor dropped, Tensor evaluated)",
    {},
    fake=_fake_scan,
    devices=("CPU",),
)
def _scan_screened(x, rows, *others):
    if cpp.library() is None:
        raise RuntimeError("select_screened: the C++ kernels, which alone have it, are not built here")
    _check(x, rows, *others[:7])
    return cpp.library().scan_screened(x.to(rows.dtype).contiguous(), rows, *others)
