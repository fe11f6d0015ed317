"""The same invariants on real weights: SmolLM2-135M in models/smollm2, or another folder.

Skipped, with the reason, where there are none. PALETTE_MODEL names another Hugging Face folder;
`python -m pytest -m realmodel` runs only these.
"""

import os
from pathlib import Path

import pytest
import torch

from prefix import Decoder, Palette, Sampling, completion_logprobs, load_policy, prompt_of
from rewards import BOXED

DEFAULT = Path(__file__).resolve().parent.parent / "models" / "smollm2"
FOLDER = Path(os.environ.get("PALETTE_MODEL", DEFAULT))
REASON = f"no real weights in {FOLDER} (set PALETTE_MODEL to a Hugging Face folder)"
pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=REASON),
]
QUESTIONS = [
    "What is 17 + 25?",
    "A box holds 12 pens. How many pens are in 3 boxes of that kind?",
    "Name a prime above 10.",
]


@pytest.fixture(scope="module")
def policy():
    return load_policy(str(FOLDER))


@pytest.fixture(scope="module")
def rows(policy):
    """Prompts and prefixes of noise; the second question has none."""
    model, reader = policy
    prompts = [prompt_of({"question": question}, reader, BOXED) for question in QUESTIONS]
    table = model.get_input_embeddings().weight.detach()
    palette = Palette(None, table, "noise", length=2)
    prefixes = [palette.draw(seed).embeddings for seed in range(3)]
    prefixes[1] = None
    return prompts, prefixes


def decode(model, prompts, prefixes, sampling, seeds=None):
    decoder = Decoder(model, slots=2)
    return decoder.generate(decoder.embed(prompts, prefixes), sampling, seeds)


@torch.no_grad()
def test_greedy_tokens_equal_those_of_generate(policy, rows):
    model, _ = policy
    prompts, prefixes = rows
    completions = decode(model, prompts, prefixes, Sampling(0.0, max_new_tokens=12))
    for prompt, prefix, completion in zip(prompts, prefixes, completions):
        x = model.get_input_embeddings()(torch.tensor([prompt.ids]))  # [1, P, d]
        if prefix is not None:
            x = torch.cat([prefix[None], x], 1)
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        expected = model.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=12
        )
        assert completion.ids == expected[0].tolist()[: len(completion.ids)]


@torch.no_grad()
def test_training_sees_the_log_probs_that_were_sampled(policy, rows):
    model, _ = policy
    prompts, prefixes = rows
    sampling = Sampling(0.7, top_p=0.9, max_new_tokens=12)
    completions = decode(model, prompts, prefixes, sampling, seeds=[1, 2, 3])
    ids = [completion.ids for completion in completions]
    sampled = []
    for completion in completions:
        sampled += completion.logprobs
    logprobs, _ = completion_logprobs(model, prompts, ids, prefixes, sampling)
    torch.testing.assert_close(logprobs, torch.tensor(sampled), atol=1e-4, rtol=0)
