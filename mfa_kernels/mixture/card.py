"""The model card of a mixture on the Hugging Face hub: what it is, what it is of, how it was fitted, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mfa_kernels.common.sharing import OWN_NAMES, local_name
from mfa_kernels.mixture.fit_report import FitReport

if TYPE_CHECKING:
    from mfa_kernels.mixture.base import Mixture

LIBRARY = "mfa_kernels"
_USE = """from mfa_kernels import MFA, steer

mfa = MFA.from_pretrained("{repo_id}")
mfa.log_prob(x), mfa.encode(x)                          # of activations (N, {features}){where}

with steer(model, mfa, layer={layer}, component=0, alpha=0.3):
    model.generate(...)
"""


def model_card(mfa: Mixture, repo_id: str, extra: Mapping[str, Any], license: str | None = None) -> str:
    """Returns the text of README.md.

    Args:
        mfa: the mixture.
        repo_id: "owner/name".
        extra: what is saved with it; "model" and "layer" are those that it is of.
        license: its name on the hub, such as "mit"; None says nothing.
    """
    base, layer = extra.get("model"), extra.get("layer")
    head: dict[str, Any] = {"library_name": LIBRARY, "license": license, "base_model": _on_the_hub(base)}
    lines = [f"{key}: {value}" for key, value in head.items() if value is not None]
    lines += ["tags:", "- interpretability", "- mixture-of-factor-analyzers"]
    facts = {
        "regions (K)": mfa.n_components, "local directions each (R)": mfa.rank, "features (D)": mfa.n_features,
        "noise": mfa.noise.replace("_", " "), **extra, **_fit_in_words(mfa.fit_report),
    }  # fmt: skip
    notes = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    where = "" if layer is None else f" of {layer}"
    use = _USE.format(repo_id=repo_id, features=mfa.n_features, where=where, layer=repr(layer))
    head_lines = "\n".join(["---", *lines, "---"])
    return f"""{head_lines}

# Mixture of factor analyzers

{_about(mfa, base, layer)}

{notes}

```python
{use.rstrip()}
```

`mfa-kernels explore` shows its regions, given activations.
"""


def _about(mfa: Mixture, base: Any, layer: Any) -> str:
    of = "".join([f" of {base}" if base else "", f", layer {layer}" if layer is not None else ""])
    return (
        f"{mfa.n_components} regions of {mfa.n_features}-dimensional activations{of}, {mfa.rank} local directions each "
        "(arXiv 2602.02464)."
    )


def _on_the_hub(name: Any) -> str | None:
    """The id of a model's repository; None for a model that is not on the hub."""
    is_id = isinstance(name, str) and name not in OWN_NAMES and local_name(name) is None and name.count("/") == 1
    return name if is_id else None


def _fit_in_words(report: FitReport | None) -> dict[str, str]:
    """The lines on a fit."""
    if report is None:
        return {}
    held_out = report.held_out()
    return {**report.described(), **({} if held_out is None else {"held-out negative log-likelihood": held_out})}
