"""What a user's mypy makes of the package: its types are read (py.typed), and a wrong call is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """\
import torch
from torch import Tensor

import mfa_kernels
from mfa_kernels import MFA, fit, harvest, kmeans, steer, stream
from mfa_kernels.data import ActivationStore
from mfa_kernels.evaluation import evaluate
from mfa_kernels.interpret import region_summaries, topics
from mfa_kernels.models import load_language_model
from mfa_kernels.steering import Add, Offset, Responsibility, Toward, alpha_for_kl, intervene

model, tokenizer = load_language_model("gpt2")
store = harvest(model, tokenizer, ["a text"], layer=2)
mfa: MFA = fit(store, n_components=32, rank=4, method="em", callbacks=[lambda mfa, record: None])
loss: Tensor = mfa(store.tensor())
log_prob: Tensor = mfa.log_prob(store.tensor())
values, bound = mfa.log_prob(store.tensor(), return_error_bound=True)
code = mfa.encode(log_prob, top_k=4)
decoded: Tensor = mfa.decode(code)
again: MFA = MFA.from_pretrained("ordavids1/MFA-8k-gemma-2-2b", layer=13)
centroids: Tensor = kmeans(decoded, 32).centroids
with steer(model, mfa, layer=2, interventions=[Toward(3, 0.3), Offset(3, torch.zeros(4))]) as handle:
    handle.update(alpha=0.1, gate=Responsibility(3, 0.5))
alpha: float = alpha_for_kl(model, {}, handle, kl=0.1)
steered: Tensor = intervene(decoded, mfa, Add(decoded[0], 0.5))
for region in region_summaries(mfa, ActivationStore("activations"), tokenizer):
    print(region.component + 1, [token.token.upper() for token in region.tokens])
score = evaluate(mfa, store)
print(score.nll, stream, mfa_kernels.functional.log_prob)
reveal_type(mfa.fit_report)
reveal_type(topics)
"""
WRONG = {
    'MFA(32, "576")': 'Argument 2 to "MFA" has incompatible type "str"; expected "int"',
    'MFA(32, 576).encode(torch.zeros(1), top="4")': 'Unexpected keyword argument "top" for "encode"',
    "a: int = MFA(32, 576).log_prob(torch.zeros(1))": "Incompatible types in assignment",
    "from mfa_kernels import harvests": 'Module "mfa_kernels" has no attribute "harvests"',
    "from mfa_kernels.steering import Towards": 'Module "mfa_kernels.steering" has no attribute "Towards"',
    "fit(torch.zeros(1), n_components=1.5)": 'Argument "n_components" to "fit" has incompatible type "float"',
}


def checked(text: str, folder: Path) -> str:
    (folder / "program.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "program.py"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.more
def test_a_program_of_a_user(tmp_path):
    """Right calls pass under --strict, wrong ones are found: in one run, whose reading of PyTorch takes the time."""
    lines = [*PROGRAM.splitlines(), *WRONG]
    said = checked("\n".join(lines) + "\n", tmp_path).splitlines()
    found: dict[int, list[str]] = {}
    for line in said:
        if line.startswith("program.py:"):
            found.setdefault(int(line.split(":")[1]), []).append(line)
    right = [text for number, texts in found.items() for text in texts if number <= len(lines) - len(WRONG)]
    assert [text for text in right if "error:" in text] == []
    assert any("FitReport" in text for text in right), right
    assert any("-> list[mfa_kernels.interpret.topics.Topic]" in text.replace("builtins.", "") for text in right), right
    for number, (call, message) in enumerate(WRONG.items(), len(lines) - len(WRONG) + 1):
        assert any(message in text for text in found.get(number, [])), (call, found.get(number))
