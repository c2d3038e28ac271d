"""A steerer with the method names of the paper's public code, for a plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.common.checks import check_choice, check_integers, check_mixture, check_model, shown
from mfa_kernels.data.language_model import check_encoder, check_evaluating, encoded, resolve_layer, without_notes
from mfa_kernels.data.twin import check_output
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.steering.handle import Handle, steer

SITES = ("resid_post", "mlp_out", "mlp_act")


class MFASteerer:
    """Steering as in arXiv 2602.02464, for users of its code; `steer` does all this and more.

    x <- (1 - alpha) x + alpha mu_k, and in two stages then x <- x + W_k z, with z not scaled by alpha; k=None stands
    for the responsibility-weighted mixture. Method names are those of the paper's code; arguments are ours. Two things
    differ: padding is left alone, and z is (R,), or (B, R) with one per batch row, also under a KV cache.

    Args:
        model: a Hugging Face causal language model, in evaluation mode whenever it is run.
        mfa: a mixture of the site's output.
        layer: index of the decoder layer.
        tokenizer: for prompts that are text.
        site: "resid_post", the layer's output; "mlp_out", that of its MLP; "mlp_act", the MLP's activations, where
            they are the output of a module of their own (GPT-2, GPT-NeoX; not gated MLPs).
    """

    def __init__(self, model: nn.Module, mfa: MFA, layer: int, tokenizer: Any = None, site: str = "resid_post") -> None:
        if tokenizer is not None:
            check_encoder(tokenizer)
        self.model: Any = model
        self.mfa, self.tokenizer = mfa, tokenizer
        check_mixture(mfa)
        self.layer = _site(check_model(model), layer, check_choice(site, SITES, "site"))
        check_output(model, self.layer, mfa.n_features)

    def intervene(self, prompts: Any, alpha: float, k: int | None = None) -> Tensor:
        """Returns logits (B, T, V) of the prompts, interpolated toward region k."""
        return self._logits(prompts, k, alpha, None)

    def generate(self, prompts: Any, alpha: float, k: int | None = None, **options: Any) -> Any:
        """Returns the text that the model writes after the prompts, interpolated toward region k.

        Args:
            prompts: a text, a list of texts, token ids (B, T), or the result of a tokenizer.
            alpha: 0 leaves the model alone, 1 replaces activations by the centroid.
            k: the region; None for the responsibility-weighted mixture.
            options: arguments of `model.generate`.

        Returns:
            Texts, prompt included, one per row, where the prompts are texts; else token ids.
        """
        return self._generate(prompts, k, alpha, None, options)

    def intervene_to_latent_two_stage(self, prompts: Any, alpha: float, z: Any, k: int | None = None) -> Tensor:
        """Returns logits (B, T, V), interpolated toward region k and then moved inside it by z."""
        return self._logits(prompts, k, alpha, z)

    def generate_to_latent_two_stage(
        self, prompts: Any, alpha: float, z: Any, k: int | None = None, **options: Any
    ) -> Any:
        """Returns texts or ids as `generate` does, interpolated toward region k and then moved inside it by z."""
        return self._generate(prompts, k, alpha, z, options)

    def generate_to_latent_two_stage_sampling(
        self, prompts: Any, alpha: float, z: Any, k: int | None = None, m: int = 1, **options: Any
    ) -> Any:
        """Returns m samples of each prompt, those of a prompt in succession; see `generate_to_latent_two_stage`."""
        return self._generate(prompts, k, alpha, z, {"do_sample": True, "num_return_sequences": m, **options})

    def _steer(self, k: int | None, alpha: float, z: Any) -> Handle:
        check_evaluating(self.model)
        return steer(self.model, self.mfa, self.layer, k, alpha, z)

    @torch.no_grad()
    def _logits(self, prompts: Any, k: int | None, alpha: float, z: Any) -> Tensor:
        with self._steer(k, alpha, z):
            return self.model(**self._inputs(prompts)).logits

    def _generate(self, prompts: Any, k: int | None, alpha: float, z: Any, options: dict[str, Any]) -> Any:
        with self._steer(k, alpha, z):
            out = self.model.generate(**self._inputs(prompts), **options)
        if not _is_text(prompts):
            return out
        return self.tokenizer.batch_decode(getattr(out, "sequences", out), skip_special_tokens=True)

    def _inputs(self, prompts: Any) -> dict[str, Any]:
        if isinstance(prompts, Tensor):
            if check_integers(prompts, "prompts").dim() != 2 or not prompts.numel() or int(prompts.min()) < 0:
                raise ValueError(f"prompts must be token ids (B, T), got {shown(prompts)}")
            return {"input_ids": prompts}
        if isinstance(prompts, Mapping):
            return without_notes(self.model, prompts)
        if not _is_text(prompts):
            raise TypeError(
                f"prompts must be a text, a list of texts, a tensor of ids or what a tokenizer returns, got "
                f"{shown(prompts)}"
            )
        if self.tokenizer is None:
            raise ValueError("tokenizer: give one to prompt with text")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        padding = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
        return encoded(self.model, self.tokenizer, texts, **padding)


def _is_text(prompts: Any) -> bool:
    return isinstance(prompts, str) or (isinstance(prompts, list) and all(isinstance(text, str) for text in prompts))


def _site(model: nn.Module, layer: int, site: str) -> str:
    """Returns the module path of the site."""
    path, module = resolve_layer(model, layer)
    if site == "resid_post":
        return path
    mlp = getattr(module, "mlp", None)
    if mlp is None:
        raise ValueError(f"site: {path} has no mlp; name the module's path in `steer`")
    if site == "mlp_out":
        return f"{path}.mlp"
    if not hasattr(mlp, "act") or hasattr(mlp, "gate_proj"):
        raise ValueError(f"site: the activations of {path}.mlp ({type(mlp).__name__}) are no module's output")
    return f"{path}.mlp.act"
