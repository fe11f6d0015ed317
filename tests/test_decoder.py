"""The batched decoder and the training log-probs against plain transformers and plain autograd; 40 s on one core."""
import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LogitsProcessorList,
                          MinPLogitsWarper, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prefix as prefix_module  # noqa: E402
from prefix import Decoder, Sampling, completion_logprobs, linear, micro_batches, pack, sample, shape_logits, uniform  # noqa: E402

torch.set_num_threads(1)
V, WIDTH, EOS = 96, 64, (3, 5, 11, 26, 40)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
MODELS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=32, tie_word_embeddings=True)),
    "qwen3-bias-yarn": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=16, attention_bias=True, rope_parameters=YARN)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=False)),
    "llama": (LlamaConfig, LlamaForCausalLM, dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True)),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=4, tie_word_embeddings=True)),
}


def build(name="qwen3", **extra):
    """A random model whose biases and norms matter, so that forgetting one shows."""
    config, model, options = MODELS[name]
    torch.manual_seed(0)
    shape = dict(vocab_size=V, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=96, eos_token_id=list(EOS), pad_token_id=EOS[1], initializer_range=0.15)
    model = model(config(**{**shape, **options, **extra})).eval()
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def qwen3():
    return build()


def rows(n, seed=0):
    """n ragged prompts of 1 to 20 tokens; odd rows have 0 to 8 prefix rows."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (n,), generator=rng).tolist()
    prompts = [torch.randint(6, V, (length,), generator=rng).tolist() for length in lengths]
    prefixes = [0.5 * torch.randn(i // 2 % 9, WIDTH, generator=rng) if i % 2 else None for i in range(n)]
    return prompts, prefixes


def embedded(model, ids, prefix):
    x = model.get_input_embeddings()(torch.tensor([ids]))  # [1, T, d]
    return x if prefix is None else torch.cat([prefix[None].to(x), x], 1)


def reference(model, prompt, prefix, new, eos=EOS):
    """One row, greedy, through transformers."""
    x = embedded(model, prompt, prefix)
    return model.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), do_sample=False, max_new_tokens=new,
                          repetition_penalty=1.0, eos_token_id=list(eos) or None, pad_token_id=0)[0].tolist()


def plain_logits(model, prompt, prefix, completion):
    """Logits [len(completion), V] that predict the completion: one row, no batching, full head."""
    logits = model(inputs_embeds=embedded(model, prompt + completion, prefix)).logits[0]
    return logits[len(logits) - len(completion) - 1:-1]


def plain_logprobs(model, prompts, prefixes, completions, temperature=1.0):
    out = [(plain_logits(model, *row) / temperature).log_softmax(-1)[range(len(row[2])), row[2]]
           for row in zip(prompts, prefixes, completions)]
    return torch.cat(out)


def flat(completions, field):
    return torch.tensor([x for c in completions for x in getattr(c, field)])


# Rollouts ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fixed", [False, True], ids=["eager", "fixed-shapes"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate(name, fixed):
    """More rows than slots, ragged prompts, prefixes of 0 to 8, some end tokens; fixed: the shapes of CUDA graphs."""
    model, (prompts, prefixes) = build(name), rows(22)
    decoder = Decoder(model, slots=9)
    decoder.fixed = fixed
    out = decoder.generate(prompts, prefixes, Sampling(temperature=0, max_new_tokens=40))
    for prompt, prefix, got in zip(prompts, prefixes, out):
        assert got.ids == reference(model, prompt, prefix, 40)
        assert got.finish == ("stop" if got.ids[-1] in EOS else "length") and len(got.ids) == len(got.logprobs)
    assert {c.finish for c in out} == {"stop", "length"}
    with torch.no_grad():
        plain = plain_logprobs(model, prompts, prefixes, [c.ids for c in out])
    assert (flat(out, "logprobs") - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen3", "llama-mha"])
def test_rows_do_not_depend_on_their_batch(name):
    """Grouped-query and multi-head attention; rows of very different length, so that one attends to much padding or none."""
    model, (prompts, prefixes) = build(name), rows(64)
    prompts[7] = prompts[7] * 9
    sampling, seeds = Sampling(max_new_tokens=24), [7 * i + 2 ** 61 for i in range(64)]
    together = [c.ids for c in Decoder(model).generate(prompts, prefixes, sampling, seeds)]
    one = Decoder(model, slots=1)
    assert [one.generate(prompts[i:i + 1], prefixes[i:i + 1], sampling, seeds[i:i + 1])[0].ids
            for i in range(0, 64, 5)] == together[::5]
    order = torch.randperm(64).tolist()
    few = Decoder(model, slots=7)
    few.fixed = True
    prompts, prefixes, seeds = ([values[i] for i in order] for values in (prompts, prefixes, seeds))
    shuffled = few.generate(prompts, prefixes, sampling, seeds)
    assert [c.ids for c in shuffled] == [together[i] for i in order]
    group = Decoder(model).generate([prompts[0]] * 8, None, sampling, range(8))
    assert len({tuple(c.ids) for c in group}) == 8


def test_seeds_default_to_torch_generator(qwen3):
    torch.manual_seed(1)
    a = Decoder(qwen3).generate([[9]] * 4, None, Sampling(max_new_tokens=8))
    b = Decoder(qwen3).generate([[9]] * 4, None, Sampling(max_new_tokens=8))
    torch.manual_seed(1)
    assert Decoder(qwen3).generate([[9]] * 4, None, Sampling(max_new_tokens=8)) == a != b


def test_group_shares_one_prefill(qwen3, monkeypatch):
    """Equal prompt and equal prefix (by value) are prefilled once, also from a row that is already being decoded."""
    prompts, prefixes = rows(4, seed=3)
    prompts = [p for p in prompts for _ in range(6)]
    prefixes = [None if x is None else x.clone() for x in prefixes for _ in range(6)]
    seen, inner = [], prefix_module.embed_rows
    monkeypatch.setattr(prefix_module, "embed_rows", lambda model, ids, *rest: seen.extend(ids) or inner(model, ids, *rest))
    seeds = list(range(24))
    shared = Decoder(qwen3).generate(prompts, prefixes, Sampling(max_new_tokens=20), seeds)
    assert len(seen) == 4
    few = Decoder(qwen3, slots=5).generate(prompts, prefixes, Sampling(max_new_tokens=20), seeds)
    alone = [Decoder(qwen3).generate([p], [x], Sampling(max_new_tokens=20), [s])[0]
             for p, x, s in list(zip(prompts, prefixes, seeds))[::5]]
    assert [c.ids for c in few] == [c.ids for c in shared] and [c.ids for c in alone] == [c.ids for c in shared][::5]


def test_same_prompt_other_prefix_is_not_shared(qwen3):
    prefixes = [None, torch.randn(4, WIDTH), torch.randn(4, WIDTH), torch.randn(2, WIDTH)]
    out = Decoder(qwen3, eos_ids=[]).generate([[9, 10]] * 4, prefixes, Sampling(temperature=0, max_new_tokens=12))
    assert [c.ids for c in out] == [reference(qwen3, [9, 10], x, 12, eos=()) for x in prefixes]


def test_end_tokens_and_generation_config():
    """All end ids of generation_config count, one of them is the pad; its penalties and filters do not."""
    model, (prompts, prefixes) = build(), rows(16)
    model.generation_config.update(repetition_penalty=1.9, top_k=1, temperature=0.1, do_sample=True)
    out = Decoder(model).generate(prompts, prefixes, Sampling(temperature=0, max_new_tokens=40))
    pad = next(c.ids[-1] for c in out if c.finish == "stop")
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    assert Decoder(model).generate(prompts, prefixes, Sampling(temperature=0, max_new_tokens=40)) == out
    assert [c.ids for c in out] == [reference(model, p, x, 40) for p, x in zip(prompts, prefixes)]
    sampled = Decoder(model).generate([[9]] * 8, None, Sampling(max_new_tokens=8), range(8))
    assert len({tuple(c.ids) for c in sampled}) > 1  # top_k = 1 would make them equal
    model.generation_config.eos_token_id = None
    assert Decoder(model).eos_ids == list(EOS)  # config's
    model.generation_config.eos_token_id = 17
    assert Decoder(model).eos_ids == [17]
    greedy = Sampling(temperature=0, max_new_tokens=30)
    endless = Decoder(model, eos_ids=[]).generate(prompts, prefixes, greedy)
    assert all(c.finish == "length" and len(c.ids) == 30 for c in endless)
    ends = {c.ids[9] for c in endless[:4]}
    out = Decoder(model, eos_ids=ends).generate(prompts, prefixes, greedy)
    assert [c.ids for c in out] == [reference(model, p, x, 30, ends) for p, x in zip(prompts, prefixes)]
    assert len({c.ids[-1] for c in out if c.finish == "stop"}) > 1  # more than one of them did end a row


def test_one_new_token_progress_and_no_rows(qwen3):
    prompts, prefixes = rows(20)
    done, greedy = [], Sampling(temperature=0, max_new_tokens=1)
    out = Decoder(qwen3, slots=8).generate(prompts, prefixes, greedy, progress=done.append)
    assert [c.ids for c in out] == [reference(qwen3, p, x, 1) for p, x in zip(prompts, prefixes)] and sum(done) == 20
    assert Decoder(qwen3).generate([], None) == []


def test_refresh_and_growth():
    """One decoder over several calls: longer rows, more rows, and changed weights after refresh."""
    model = build()
    decoder, greedy = Decoder(model, slots=8), Sampling(temperature=0, max_new_tokens=12)
    for n, seed in ((3, 0), (12, 1), (5, 2)):
        prompts, prefixes = rows(n, seed)
        out = decoder.generate(prompts, prefixes, greedy)
        assert [c.ids for c in out] == [reference(model, p, x, 12) for p, x in zip(prompts, prefixes)]
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn_like(p)
        decoder.refresh()
        assert decoder.cache is None and not decoder.blocks  # nothing is held over an update
    long = decoder.generate(prompts, prefixes, Sampling(temperature=0, max_new_tokens=60))
    assert [c.ids for c in long] == [reference(model, p, x, 60) for p, x in zip(prompts, prefixes)]


@pytest.mark.parametrize("columns, tiles", [([1024, 512, 512], 8), ([2112], 11), ([1999], 1)], ids=str)
def test_products_by_tiles(columns, tiles):
    """A large fp32 matrix is packed as tiles (none divides 1999); the product keeps its columns in order, with their bias."""
    linears, x = [torch.nn.Linear(512, n) for n in columns], torch.randn(5, 512)
    packed = pack(torch.float32, *linears)
    assert packed[0].shape == (tiles, 512, sum(columns) // tiles)
    assert (linear(x, packed) - torch.cat([m(x) for m in linears], 1)).abs().max() < 1e-5
    packed = pack(torch.bfloat16, torch.nn.Linear(512, 2112, bias=False))
    assert packed[0].shape == (1, 512, 2112) and packed[1] is None


def test_bfloat16_matches_the_module(qwen3):
    """The transposed products of bf16: the log-probs differ from the module's by bf16 rounding only."""
    model, (prompts, prefixes) = build("qwen2").bfloat16(), rows(12)
    with torch.profiler.profile() as profile:
        out = Decoder(model).generate(prompts, prefixes, Sampling(max_new_tokens=16), range(12))
    assert not any("attention_math" in event.key for event in profile.key_averages())  # the kernel without fusion: half as fast
    with torch.no_grad():
        prefixes = [x if x is None else x.bfloat16() for x in prefixes]
        plain = plain_logprobs(model.float(), prompts, prefixes, [c.ids for c in out])
    assert (flat(out, "logprobs") - plain).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_bfloat16_decoder_of_fp32_weights_is_that_of_bfloat16_weights(name):
    """Only the packed copy and the cache are rounded; the model keeps its weights."""
    model, (prompts, prefixes) = build(name), rows(12)
    out = Decoder(model, dtype=torch.bfloat16).generate(prompts, prefixes, Sampling(max_new_tokens=16), range(12))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    fp32 = Decoder(model).generate(prompts, prefixes, Sampling(max_new_tokens=16), range(12))
    rotary = copy.deepcopy(model.model.rotary_emb)  # its frequencies stay fp32, as in a model that is loaded in bf16
    model.bfloat16().model.rotary_emb = rotary
    assert out == Decoder(model).generate(prompts, prefixes, Sampling(max_new_tokens=16), range(12)) != fp32


# Sampling ------------------------------------------------------------------------------------------------------------

FILTERS = [dict(), dict(temperature=0.7), dict(top_p=0.8), dict(top_k=5), dict(min_p=0.1),
           dict(temperature=1.3, top_p=0.9, top_k=20, min_p=0.02)]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_equal_transformers(options):
    logits = 2 * torch.randn(200, V, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.get("temperature", 1.0))])
    for key, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if key in options:
            warpers.append(warper(options[key]))
    expected = warpers(None, logits.clone()).softmax(-1)
    got = shape_logits(logits, Sampling(**options)).softmax(-1)
    assert torch.equal(got > 0, expected > 0) and (got - expected).abs().max() < 1e-6
    token, logprob = sample(logits, torch.rand(200), Sampling(**options))
    assert (logprob - expected.gather(1, token[:, None])[:, 0].log()).abs().max() < 1e-5


def test_sampling_inverts_the_cdf():
    """Against a plain loop over the CDF, and with u at its ends, where only kept tokens may come out."""
    logits, u = torch.randn(50, 12, dtype=torch.float64), torch.rand(50)
    token, _ = sample(logits.float(), u, Sampling())
    for row, (z, x) in enumerate(zip(logits, u)):
        total, probs = 0.0, z.softmax(-1).tolist()
        for index, p in enumerate(probs):
            total += p
            if x < total:
                break
        assert token[row] == index
    for extreme in (0.0, 1 - 2.0 ** -23):
        token, logprob = sample(logits.float(), torch.full((50,), extreme), Sampling(top_k=3))
        assert (token[:, None] == logits.topk(3).indices).any(1).all() and logprob.isfinite().all()


def test_uniform_numbers():
    u = uniform(torch.arange(2000)[:, None], torch.arange(50))  # [2000, 50]: seeds next to each other
    assert 0 <= u.min() and u.max() < 1 and len(u.unique()) > 0.99 * u.numel()
    counts = torch.histc(u, 64, 0, 1)
    chi2 = ((counts - u.numel() / 64) ** 2 / (u.numel() / 64)).sum()
    assert 30 < chi2 < 110  # 63 degrees of freedom: 63 +- 11
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):  # neither neighbouring seeds nor indices go together
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.02
    mask, z, values = 2 ** 64 - 1, 0, []
    for _ in range(2):  # splitmix64 from state 0 in plain Python: its published first outputs
        z = (z + 0x9E3779B97F4A7C15) & mask
        x = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        values.append(((x ^ x >> 31) & 2 ** 23 - 1) / 2 ** 23)
    assert uniform(torch.tensor(0), torch.tensor([1, 2])).tolist() == values  # the finaliser maps seed 0 to state 0


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.6, top_p=0.9, top_k=12, min_p=0.05)], ids=str)
def test_sampled_distribution(qwen3, options):
    """4,000 first tokens of one prompt against the module's softmax: a chi-square test."""
    with torch.no_grad():
        probs = shape_logits(plain_logits(qwen3, [9, 10, 11], None, [0]), Sampling(**options)).softmax(-1)[0]
    n = 4000
    out = Decoder(qwen3, slots=500).generate([[9, 10, 11]] * n, None, Sampling(max_new_tokens=1, **options), range(n))
    counts = torch.bincount(flat(out, "ids"), minlength=V).float()
    assert counts[probs == 0].sum() == 0
    often = probs * n >= 5
    chi2, freedom = ((counts - n * probs)[often] ** 2 / (n * probs)[often]).sum(), int(often.sum()) - 1
    assert freedom > 3 and chi2 < freedom + 4 * math.sqrt(2 * freedom)


# Training ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_training_logprobs_equal_the_rollouts(qwen3, options):
    prompts, prefixes = rows(24, seed=4)
    sampling = Sampling(max_new_tokens=20, **options)
    out = Decoder(qwen3, slots=8).generate(prompts, prefixes, sampling, range(24))
    with torch.no_grad():
        logprobs, entropy = completion_logprobs(qwen3, prompts, [c.ids for c in out], prefixes, sampling)
        assert (logprobs - flat(out, "logprobs")).abs().max() <= 1e-5
        for i, (prompt, prefix, c) in enumerate(zip(prompts, prefixes, out)):
            p = shape_logits(plain_logits(qwen3, prompt, prefix, c.ids), sampling).softmax(-1)
            start = sum(len(c.ids) for c in out[:i])
            plain = torch.special.entr(p).sum(-1)
            assert (entropy[start:start + len(plain)] - plain).abs().max() < 1e-5


def test_chosen_token_is_always_kept():
    logits, chosen = torch.randn(40, V), torch.randint(V, (40,))
    z = shape_logits(logits, Sampling(top_k=2), chosen)
    kept = z > prefix_module.DROPPED
    assert kept.gather(1, chosen[:, None]).all() and (kept.sum(-1) <= 3).all()


@pytest.mark.parametrize("case", ["tied", "untied", "frozen head", "filters"])
def test_gradients_equal_plain_autograd(case, monkeypatch):
    """Of weights and prefixes; with many small chunks of the head, and a row without a completion."""
    model = build("qwen2" if case == "untied" else "qwen3")
    if case == "frozen head":
        model = build("qwen2")
        model.lm_head.weight.requires_grad_(False)
    sampling = Sampling(temperature=0.7, top_p=0.9) if case == "filters" else Sampling(temperature=0.7)
    prompts, prefixes = rows(9, seed=5)
    prefixes = [x if x is None else x.requires_grad_() for x in prefixes]
    completions = [c.ids for c in Decoder(model).generate(prompts, prefixes, Sampling(max_new_tokens=9), range(9))]
    completions[2] = []
    weights = torch.randn(sum(map(len, completions)))
    leaves = [p for p in model.parameters() if p.requires_grad] + [x for x in prefixes if x is not None and len(x)]
    monkeypatch.setattr(prefix_module, "CHUNK", 7 * V)
    logprobs, entropy = completion_logprobs(model, prompts, completions, prefixes, sampling)
    assert not entropy.requires_grad
    got = torch.autograd.grad((logprobs * weights).sum(), leaves)
    plain = []
    for prompt, prefix, c in zip(prompts, prefixes, completions):
        if c:
            z = plain_logits(model, prompt, prefix, c) / 0.7
            if case == "filters":
                kept = TopPLogitsWarper(0.9)(None, z.detach()) > -torch.inf
                z = z.masked_fill(~kept.scatter(1, torch.tensor(c)[:, None], True), -torch.inf)
            plain.append(z.log_softmax(-1)[range(len(c)), c])
    assert (logprobs - torch.cat(plain)).abs().max() <= 1e-5
    for a, b in zip(got, torch.autograd.grad((torch.cat(plain) * weights).sum(), leaves)):
        assert (a - b).abs().max() <= 1e-4 * max(1, b.abs().max())


def test_training_under_autocast(qwen3):
    prompts, prefixes = rows(6)
    completions = [[7, 8, 9]] * 6
    with torch.no_grad():
        exact, _ = completion_logprobs(qwen3, prompts, completions, prefixes)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = completion_logprobs(qwen3, prompts, completions, prefixes)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32 and (logprobs - exact).abs().max() < 0.3
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in qwen3.parameters())
    qwen3.zero_grad()


def test_no_completion_tokens_and_no_entropy(qwen3):
    logprobs, entropy = completion_logprobs(qwen3, [[9], [9, 10]], [[], []], None, with_entropy=False)
    assert logprobs.shape == (0,) and entropy is None
    logprobs.sum().backward()  # must not fail: a micro-batch may be all empty


def test_micro_batches():
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (100,), generator=rng).tolist() + [500]
    groups = micro_batches(lengths, 200)
    assert sorted(i for g in groups for i in g) == list(range(101)) and groups[0] == [100]
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 200 for g in groups)
    order = [lengths[i] for g in groups for i in g]
    assert order == sorted(order, reverse=True)
    assert micro_batches([3, 9, 4], 9) == [[1], [2, 0]] and micro_batches([], 9) == []
    assert all((len(a) + 1) * lengths[a[0]] > 200 for a in groups[:-1])  # no group could have taken one more


# Errors --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(temperature=-1), dict(top_p=0), dict(top_p=1.1), dict(top_k=-1),
                                     dict(min_p=2), dict(min_p=-0.1), dict(max_new_tokens=0),
                                     dict(temperature=math.nan)], ids=str)
def test_bad_sampling(options):
    with pytest.raises(ValueError, match="out of range"):
        Sampling(**options)


def test_bad_rows(qwen3):
    decoder, short = Decoder(qwen3, max_length=20), Sampling(max_new_tokens=4)
    for arguments, words in ((([[9], []],), "prompt 1 is empty"),
                             (([[9]], [torch.zeros(2, 3)]), r"prefix 0 has shape \[2, 3\]"),
                             (([[9]], [torch.zeros(WIDTH)]), "prefix 0 has shape"),
                             (([[9] * 17],), "beyond max_length = 20"),
                             (([[9]], [None, None]), "2 prefixes")):
        with pytest.raises(ValueError, match=words):
            decoder.generate(*arguments, sampling=short)
    with pytest.raises(ValueError, match="1 seeds"):
        decoder.generate([[9], [9]], seeds=[1])
    with pytest.raises(ValueError, match="1 seeds or completions"):
        completion_logprobs(qwen3, [[9], [9]], [[8]], None)
    with pytest.raises(ValueError, match="slots"):
        Decoder(qwen3, slots=0)
    assert len(decoder.generate([[9] * 16], None, short)[0].ids) <= 4  # exactly max_length


def test_refused_models():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    sliding = build("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    gelu = build("llama", hidden_act="gelu")
    dynamic = build("llama", rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))
    for model in (gpt2, sliding, gelu, dynamic):
        with pytest.raises(ValueError, match="qwen3, qwen2, llama"):
            Decoder(model)
    with pytest.raises(ValueError, match="is not served"):
        completion_logprobs(sliding, [[9]], [[9]], None)
