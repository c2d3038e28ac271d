"""Fine-tuning with a mixture in the loss, by the Trainer of transformers.

    python examples/trainer_loss.py

The model is trained on texts as usual, and its activations at one layer are kept where the mixture knows them: the
mixture's mean negative log-likelihood of them, a number in nats, is added to the loss. Gradients through it are exact.
"""

from __future__ import annotations

import tempfile
from typing import Any

from _small import LAYER, TEXTS, model_and_mixture, parser
from transformers import Trainer, TrainingArguments

from mfa_kernels import MFA

WEIGHT = 0.1  # of a nat per feature beside a nat per token


class RegionTrainer(Trainer):
    """A Trainer whose loss has the mixture's negative log-likelihood of the activations of a layer."""

    def __init__(self, mfa: MFA, layer: int, **given: Any) -> None:
        super().__init__(**given)
        self.mfa, self.layer = mfa.requires_grad_(False), layer
        self.seen: list[float] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(**inputs, output_hidden_states=True)
        hidden = outputs.hidden_states[self.layer + 1]  # the first is the embedding, and the last may be normalised
        self.mfa.to(hidden.device)  # where the Trainer has put the model
        surprise = self.mfa(hidden[:, 1:].flatten(0, 1))  # the first token is an attention sink, unlike any other
        self.seen.append(float(surprise.detach()))
        loss = outputs.loss + WEIGHT * surprise / self.mfa.n_features
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    given = parser(__doc__).parse_args()
    model, tokenizer, mfa = model_and_mixture(given.model)
    ids = tokenizer("\n".join(TEXTS), return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)[:64]
    rows = [{"input_ids": window, "labels": window} for window in windows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-4, logging_steps=1,
            report_to=[], save_strategy="no",
        )  # fmt: skip
        trainer = RegionTrainer(mfa, LAYER, model=model.train(), args=arguments, train_dataset=rows)
        trainer.train()
    print(f"activations under the mixture: {trainer.seen[0]:.1f} -> {trainer.seen[-1]:.1f} nats per token")


if __name__ == "__main__":
    main()
