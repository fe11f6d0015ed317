"""The same invariants on real weights: SmolLM2-135M in models/smollm2 (or the folder named by PALETTE_MODEL).

Skipped, with the reason, where there is none. `python -m pytest -m realmodel` runs only these.
"""
import os
from pathlib import Path

import pytest
import torch

from prefix import Decoder, Palette, Sampling, completion_logprobs, load_policy
from rewards import BOXED, prompt_ids

FOLDER = Path(os.environ.get("PALETTE_MODEL", Path(__file__).resolve().parent.parent / "models" / "smollm2"))
pytestmark = [pytest.mark.realmodel, pytest.mark.skipif(
    not (FOLDER / "config.json").is_file(), reason=f"no real weights in {FOLDER} (set PALETTE_MODEL to a Hugging Face folder)")]
QUESTIONS = ["What is 17 + 25?", "A box holds 12 pens. How many pens are in 3 boxes of that kind?", "Name a prime above 10."]


@pytest.fixture(scope="module")
def policy():
    return load_policy(str(FOLDER))


def test_greedy_tokens_equal_generate_and_training_sees_the_sampled_log_probs(policy):
    model, tokenizer = policy
    embed = model.get_input_embeddings()
    prompts = [prompt_ids(question, tokenizer, BOXED) for question in QUESTIONS]
    prefixes, _ = Palette(None, embed.weight.detach(), "noise", 2).draw(range(3))
    prefixes[1] = None
    greedy = Decoder(model, slots=2).generate(prompts, prefixes, Sampling(0.0, max_new_tokens=12))
    for prompt, prefix, completion in zip(prompts, prefixes, greedy):
        inputs = embed(torch.tensor([prompt])).detach()
        inputs = inputs if prefix is None else torch.cat([prefix[None], inputs], 1)
        expected = model.generate(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
                                  do_sample=False, max_new_tokens=12)[0].tolist()
        assert completion.ids == expected[:len(completion.ids)]
    sampling = Sampling(0.7, top_p=0.9, max_new_tokens=12)
    sampled = Decoder(model, slots=2).generate(prompts, prefixes, sampling, seeds=[1, 2, 3])
    with torch.no_grad():
        logprobs, _ = completion_logprobs(model, prompts, [c.ids for c in sampled], prefixes, sampling)
    torch.testing.assert_close(logprobs, torch.tensor([x for c in sampled for x in c.logprobs]), atol=1e-4, rtol=0)
