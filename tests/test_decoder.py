"""The two decoders and the training log-probs against transformers and plain autograd.

Random small models of every family that prefix.py serves; about 40 s on one core.
"""

import copy
import math

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import prefix as prefix_file
from prefix import (
    Decoder,
    Prompt,
    Sampling,
    completion_logprobs,
    embed_rows,
    generate_plainly,
    micro_batches,
    pack,
    sample,
    shape_logits,
    uniform,
)

VOCABULARY_SIZE, WIDTH = 96, 64
END_TOKENS = (3, 5, 11, 26, 40)  # many: random completions end at many lengths
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
# Each differs in something that the decoder must get right.
MODELS = {
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3 bias yarn": {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN},
    "qwen2": {"tie_word_embeddings": False},
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "llama mha": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 5},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 20},
]


def build(name="qwen3", **options):
    """A random model whose biases and norms matter, so that forgetting one shows."""
    config_class, model_class = CLASSES[name.split()[0]]
    settings = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "eos_token_id": list(END_TOKENS),
        "pad_token_id": END_TOKENS[1],
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**{**settings, **MODELS[name], **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def qwen3():
    return build()


def make_rows(count, seed=0):
    """Ragged prompts of 1 to 20 tokens, and prefixes; odd rows have one of 0 to 8 embeddings."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (count,), generator=generator).tolist()
    prompts = []
    for length in lengths:
        ids = torch.randint(6, VOCABULARY_SIZE, (length,), generator=generator)
        prompts.append(Prompt(ids.tolist()))
    prefixes = []
    for i in range(count):
        prefix = None
        if i % 2 == 1:
            prefix = 0.5 * torch.randn(i // 2 % 9, WIDTH, generator=generator)
        prefixes.append(prefix)
    return prompts, prefixes


def decode(model, prompts, prefixes, sampling, seeds=None, **options):
    decoder = Decoder(model, **options)
    return decoder.generate(decoder.embed(prompts, prefixes), sampling, seeds)


def ids_of(completions):
    return [completion.ids for completion in completions]


def logprobs_of(completions):
    """Of all tokens, row after row: [N]."""
    logprobs = []
    for completion in completions:
        logprobs += completion.logprobs
    return torch.tensor(logprobs)


def module_inputs(model, prompt, prefix, completion=()):
    """Embeddings [1, T, d] of one row, as the module itself embeds tokens."""
    ids = torch.tensor([prompt.ids + list(completion)])
    x = model.get_input_embeddings()(ids)
    if prefix is None:
        return x
    return torch.cat([prefix[None].to(x), x], 1)


def transformers_greedy(model, prompts, prefixes, count, end_tokens=END_TOKENS):
    """Greedy ids by transformers' generate, one row at a time."""
    completions = []
    for prompt, prefix in zip(prompts, prefixes):
        x = module_inputs(model, prompt, prefix)
        ids = model.generate(
            inputs_embeds=x,
            attention_mask=torch.ones(x.shape[:2]),
            do_sample=False,
            max_new_tokens=count,
            repetition_penalty=1.0,
            eos_token_id=list(end_tokens) or None,
            pad_token_id=0,
        )
        completions.append(ids[0].tolist())
    return completions


def module_logits(model, prompt, prefix, completion):
    """Logits [len(completion), V] that predict it: one row, no batch, the full head."""
    logits = model(inputs_embeds=module_inputs(model, prompt, prefix, completion)).logits[0]
    return logits[len(logits) - len(completion) - 1 : -1]


def module_logprobs(model, prompts, prefixes, completions, temperature=1.0, top_p=1.0):
    """Log-probs of all tokens [N], row after row, from full logits; sampled tokens are kept."""
    logprobs = []
    for prompt, prefix, ids in zip(prompts, prefixes, completions):
        if not ids:
            continue
        logits = module_logits(model, prompt, prefix, ids) / temperature
        if top_p < 1:
            kept = TopPLogitsWarper(top_p)(None, logits.detach()) > -torch.inf
            kept = kept.scatter(1, torch.tensor(ids)[:, None], True)
            logits = logits.masked_fill(~kept, -torch.inf)
        logprobs.append(logits.log_softmax(-1)[range(len(ids)), ids])
    return torch.cat(logprobs)


# ---- Rollouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True], ids=["eager", "fixed sizes"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate(name, fixed):
    """More rows than slots, ragged, some that end early; fixed: the step sizes of CUDA graphs."""
    model = build(name)
    prompts, prefixes = make_rows(22)
    decoder = Decoder(model, slots=9)
    decoder.fixed = fixed
    rows = decoder.embed(prompts, prefixes)
    completions = decoder.generate(rows, Sampling(temperature=0, max_new_tokens=40))
    assert ids_of(completions) == transformers_greedy(model, prompts, prefixes, 40)
    for completion in completions:
        ended = completion.ids[-1] in END_TOKENS
        assert completion.finish == ("stop" if ended else "length")
        assert len(completion.ids) == len(completion.logprobs)
    assert {completion.finish for completion in completions} == {"stop", "length"}
    with torch.no_grad():
        expected = module_logprobs(model, prompts, prefixes, ids_of(completions))
    assert (logprobs_of(completions) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{"temperature": 0}, *FILTERS], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_the_fast_decoder_samples_what_the_plain_one_does(name, options):
    model = build(name)
    prompts, prefixes = make_rows(14, seed=2)
    sampling = Sampling(max_new_tokens=16, **options)
    seeds = [11 * i + 2**62 for i in range(14)]
    decoder = Decoder(model, slots=5)
    rows = decoder.embed(prompts, prefixes)
    fast = decoder.generate(rows, sampling, seeds)
    plain = generate_plainly(model, rows, sampling, seeds, END_TOKENS)
    assert ids_of(fast) == ids_of(plain)
    assert [c.finish for c in fast] == [c.finish for c in plain]
    assert (logprobs_of(fast) - logprobs_of(plain)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen3", "llama mha"])
def test_rows_do_not_depend_on_their_batch(name):
    """Rows of very different length, so that one attends to much padding, another to none."""
    model = build(name)
    prompts, prefixes = make_rows(64)
    prompts[7] = Prompt(prompts[7].ids * 9)
    sampling = Sampling(max_new_tokens=24)
    seeds = [7 * i + 2**61 for i in range(64)]
    together = ids_of(decode(model, prompts, prefixes, sampling, seeds))

    alone = Decoder(model, slots=1)
    for i in range(0, 64, 5):
        row = alone.embed([prompts[i]], [prefixes[i]])
        assert alone.generate(row, sampling, [seeds[i]])[0].ids == together[i]

    order = torch.randperm(64).tolist()
    few = Decoder(model, slots=7)
    few.fixed = True
    rows = few.embed([prompts[i] for i in order], [prefixes[i] for i in order])
    shuffled = few.generate(rows, sampling, [seeds[i] for i in order])
    assert ids_of(shuffled) == [together[i] for i in order]


def test_each_seed_gives_a_completion_of_its_own(qwen3):
    completions = decode(qwen3, [Prompt([9])] * 8, None, Sampling(max_new_tokens=24), range(8))
    assert len({tuple(completion.ids) for completion in completions}) == 8


def test_seeds_default_to_the_generator_of_torch(qwen3):
    prompts = [Prompt([9])] * 4
    sampling = Sampling(max_new_tokens=8)
    torch.manual_seed(1)
    first = decode(qwen3, prompts, None, sampling)
    second = decode(qwen3, prompts, None, sampling)
    torch.manual_seed(1)
    assert decode(qwen3, prompts, None, sampling) == first
    assert first != second


def test_equal_rows_are_prefilled_once(qwen3, monkeypatch):
    """Equal prompt and equal prefix by value, also of a row that is already being decoded."""
    prefilled = []
    original = Decoder._prefill

    def note_rows(decoder, first, rows):
        prefilled.extend(rows)
        return original(decoder, first, rows)

    monkeypatch.setattr(Decoder, "_prefill", note_rows)
    few_prompts, few_prefixes = make_rows(4, seed=3)
    prompts, prefixes = [], []
    for prompt, prefix in zip(few_prompts, few_prefixes):
        for _ in range(6):
            prompts.append(Prompt(list(prompt.ids)))
            prefixes.append(None if prefix is None else prefix.clone())
    sampling = Sampling(max_new_tokens=20)
    seeds = list(range(24))

    shared = ids_of(decode(qwen3, prompts, prefixes, sampling, seeds))
    assert len(prefilled) == 4
    few_slots = ids_of(decode(qwen3, prompts, prefixes, sampling, seeds, slots=5))
    assert few_slots == shared
    assert len(prefilled) < 4 + 24
    for i in range(0, 24, 5):
        alone = decode(qwen3, [prompts[i]], [prefixes[i]], sampling, [seeds[i]])
        assert alone[0].ids == shared[i]


def test_rows_of_one_prompt_share_its_embeddings(qwen3):
    prompts = [Prompt([9, 10]), Prompt([9, 10]), Prompt([9, 11])]
    rows = Decoder(qwen3).embed(prompts)
    assert rows[0].prompt.data_ptr() == rows[1].prompt.data_ptr() != rows[2].prompt.data_ptr()
    assert rows[0].key == rows[1].key != rows[2].key


def test_the_same_prompt_under_another_prefix_is_another_row(qwen3):
    prompts = [Prompt([9, 10])] * 4
    prefixes = [None, torch.randn(4, WIDTH), torch.randn(4, WIDTH), torch.randn(2, WIDTH)]
    sampling = Sampling(temperature=0, max_new_tokens=12)
    completions = decode(qwen3, prompts, prefixes, sampling, eos_ids=[])
    expected = transformers_greedy(qwen3, prompts, prefixes, 12, end_tokens=())
    assert ids_of(completions) == expected


def test_generation_config_changes_nothing_but_the_end_tokens():
    """All of its end tokens count, one of which is the pad; its penalties and filters do not."""
    model = build()
    prompts, prefixes = make_rows(16)
    greedy = Sampling(temperature=0, max_new_tokens=40)
    model.generation_config.update(repetition_penalty=1.9, top_k=1, temperature=0.1, do_sample=True)
    completions = decode(model, prompts, prefixes, greedy)
    assert ids_of(completions) == transformers_greedy(model, prompts, prefixes, 40)

    ends = [completion.ids[-1] for completion in completions if completion.finish == "stop"]
    model.config.pad_token_id = ends[0]
    model.generation_config.pad_token_id = ends[0]
    assert decode(model, prompts, prefixes, greedy) == completions

    sampled = decode(model, [Prompt([9])] * 8, None, Sampling(max_new_tokens=8), range(8))
    assert len({tuple(completion.ids) for completion in sampled}) > 1  # top_k = 1: all equal

    model.generation_config.eos_token_id = None
    assert Decoder(model).eos_ids == list(END_TOKENS)  # config's
    model.generation_config.eos_token_id = 17
    assert Decoder(model).eos_ids == [17]


def test_every_end_token_ends_a_row(qwen3):
    prompts, prefixes = make_rows(16)
    greedy = Sampling(temperature=0, max_new_tokens=30)
    endless = decode(qwen3, prompts, prefixes, greedy, eos_ids=[])
    for completion in endless:
        assert completion.finish == "length"
        assert len(completion.ids) == 30

    ends = {completion.ids[9] for completion in endless[:4]}
    completions = decode(qwen3, prompts, prefixes, greedy, eos_ids=ends)
    assert ids_of(completions) == transformers_greedy(qwen3, prompts, prefixes, 30, ends)
    last = {completion.ids[-1] for completion in completions if completion.finish == "stop"}
    assert len(last) > 1


def test_one_new_token_progress_and_no_rows(qwen3):
    prompts, prefixes = make_rows(20)
    ended = []
    decoder = Decoder(qwen3, slots=8)
    rows = decoder.embed(prompts, prefixes)
    greedy = Sampling(temperature=0, max_new_tokens=1)
    completions = decoder.generate(rows, greedy, progress=ended.append)
    assert ids_of(completions) == transformers_greedy(qwen3, prompts, prefixes, 1)
    assert sum(ended) == 20
    assert decoder.generate(decoder.embed([])) == []


def test_refresh_takes_the_new_weights_and_buffers_grow():
    """One decoder over several calls: longer rows, more rows, changed weights."""
    model = build()
    decoder = Decoder(model, slots=8)

    def compare(prompts, prefixes, count):
        rows = decoder.embed(prompts, prefixes)
        greedy = Sampling(temperature=0, max_new_tokens=count)
        ids = ids_of(decoder.generate(rows, greedy))
        assert ids == transformers_greedy(model, prompts, prefixes, count)

    for count, seed in ((3, 0), (12, 1), (5, 2)):
        prompts, prefixes = make_rows(count, seed)
        compare(prompts, prefixes, 12)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        decoder.refresh()
        assert decoder.cache is None and not decoder.blocks  # nothing is held over an update
    compare(prompts, prefixes, 12)
    compare(prompts, prefixes, 60)


needs_onednn = pytest.mark.skipif(
    not prefix_file.onednn_is_faster(torch.empty(512, 512)),
    reason="needs a CPU with AVX-512 and oneDNN",
)


@pytest.mark.parametrize("smallest", [0, 10**9], ids=["oneDNN", "torch"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_packed_layers_keep_their_columns_in_order(dtype, tolerance, smallest, monkeypatch):
    """Whichever library multiplies; biases stay with their column."""
    monkeypatch.setattr(prefix_file, "ONEDNN_FROM", smallest)
    linears = [torch.nn.Linear(64, columns) for columns in (96, 32, 32)]
    x = torch.randn(5, 64)
    expected = torch.cat([linear(x) for linear in linears], 1)
    packed = pack(dtype, *linears)
    if smallest > 0:
        assert not packed.weight.is_mkldnn
    with torch.inference_mode():
        assert (packed(x.to(dtype)) - expected).abs().max() < tolerance


def test_packed_layers_without_a_bias_have_none():
    assert pack(torch.float32, torch.nn.Linear(8, 8, bias=False)).bias is None


@needs_onednn
@pytest.mark.parametrize("name", MODELS)
def test_by_onednn_too_greedy_tokens_are_those_of_transformers(name, monkeypatch):
    monkeypatch.setattr(prefix_file, "ONEDNN_FROM", 0)
    model = build(name)
    prompts, prefixes = make_rows(20)
    decoder = Decoder(model, slots=8)
    rows = decoder.embed(prompts, prefixes)
    assert decoder.blocks[0].qkv.weight.is_mkldnn
    completions = decoder.generate(rows, Sampling(temperature=0, max_new_tokens=12))
    assert ids_of(completions) == transformers_greedy(model, prompts, prefixes, 12)


def test_rows_that_come_out_of_order_are_refused(qwen3):
    """Rows of one prefill stand side by side in the slots, because the longest come first."""
    decoder = Decoder(qwen3)
    lengths = [20, 400, 30]
    rows = decoder.embed([Prompt([7 + i] * length) for i, length in enumerate(lengths)])
    decoder._reserve(500, len(rows))
    jobs = list(decoder._queue(rows, range(3)))
    assert [job.row.length for job in jobs] == [400, 30, 20]
    decoder._admit(jobs, [], Sampling())
    with pytest.raises(AssertionError, match="out of order"):
        decoder._admit([jobs[1], jobs[0], jobs[2]], [], Sampling())


def test_bfloat16_matches_the_module():
    """Log-probs differ by rounding only, and no attention falls back to the slow kernel."""
    model = build("qwen2").bfloat16()
    prompts, prefixes = make_rows(12)
    with torch.profiler.profile() as profile:
        completions = decode(model, prompts, prefixes, Sampling(max_new_tokens=16), range(12))
    events = [event.key for event in profile.key_averages()]
    assert not any("attention_math" in event for event in events)  # half as fast
    rounded = [None if prefix is None else prefix.bfloat16() for prefix in prefixes]
    with torch.no_grad():
        expected = module_logprobs(model.float(), prompts, rounded, ids_of(completions))
    assert (logprobs_of(completions) - expected).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_bfloat16_decoder_of_fp32_weights_is_that_of_bfloat16_weights(name):
    """Only the packed copy and the cache are rounded; the model keeps its weights."""
    model = build(name)
    prompts, prefixes = make_rows(12)
    sampling = Sampling(max_new_tokens=16)
    rounded = decode(model, prompts, prefixes, sampling, range(12), dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    exact = decode(model, prompts, prefixes, sampling, range(12))

    rotary = copy.deepcopy(model.model.rotary_emb)  # stays fp32, as in a model loaded in bf16
    model.bfloat16().model.rotary_emb = rotary
    assert decode(model, prompts, prefixes, sampling, range(12)) == rounded
    assert rounded != exact


# ---- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_equal_those_of_transformers(options):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, VOCABULARY_SIZE, generator=generator)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.get("temperature", 1.0))])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    expected = warpers(None, logits.clone()).softmax(-1)

    probs = shape_logits(logits, Sampling(**options)).softmax(-1)
    assert torch.equal(probs > 0, expected > 0)
    assert (probs - expected).abs().max() < 1e-6
    token, logprob = sample(logits, torch.rand(200), Sampling(**options))
    picked = expected.gather(1, token[:, None])[:, 0]
    assert (logprob - picked.log()).abs().max() < 1e-5


def test_sampling_inverts_the_cumulative_distribution():
    """Against a plain loop over the tokens."""
    logits = torch.randn(50, 12, dtype=torch.float64)
    uniforms = torch.rand(50)
    tokens, _ = sample(logits.float(), uniforms, Sampling())
    for token, probs, u in zip(tokens, logits.softmax(-1), uniforms):
        total = 0.0
        for expected, p in enumerate(probs.tolist()):  # noqa: B007
            total += p
            if u < total:
                break
        assert token == expected


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-23])
def test_only_kept_tokens_come_out_at_both_ends_of_u(u):
    logits = torch.randn(50, 12)
    token, logprob = sample(logits, torch.full((50,), u), Sampling(top_k=3))
    likeliest = logits.topk(3).indices  # [50, 3]
    assert (token[:, None] == likeliest).any(1).all()
    assert logprob.isfinite().all()


def test_a_sum_that_is_not_flat_over_filtered_tokens_draws_none_of_them():
    """As a GPU's parallel sum may be: it rises, or falls, where the probability is 0."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.0, 0.5, 0.0, 0.25, 0.0]])
    cdf = torch.tensor([[1e-7, 0.25, 0.2500001, 0.2499999, 0.75, 0.7500001, 0.9999999, 1.0]])
    for u in (0.0, 0.25, 0.2500001, 0.75, 0.7500001, 0.99999994):
        rising_cdf = prefix_file.rising(probs, cdf)
        threshold = torch.tensor([[u]]) * rising_cdf[:, -1:]
        token = torch.searchsorted(rising_cdf, threshold, right=True)
        assert probs[0, token.item()] > 0
    assert prefix_file.rising(probs, cdf).tolist()[0][1:4] == [0.25] * 3


def test_a_cpu_sum_is_flat_over_filtered_tokens():
    """So that it needs no mending."""
    probs = shape_logits(torch.randn(50, 3000), Sampling(top_p=0.6)).softmax(-1)
    cdf = probs.cumsum(-1)
    assert torch.equal(cdf, prefix_file.rising(probs, cdf))


def test_uniform_numbers_are_uniform_and_do_not_go_together():
    u = uniform(torch.arange(2000)[:, None], torch.arange(50))  # [2000, 50]: neighbouring seeds
    assert u.min() >= 0 and u.max() < 1
    assert len(u.unique()) > 0.99 * u.numel()

    expected = u.numel() / 64
    counts = torch.histc(u, 64, 0, 1)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert 30 < chi2 < 110  # 63 degrees of freedom: 63 +- 11

    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):  # next seed, next index
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.02


def test_uniform_numbers_are_those_of_splitmix64():
    """Against plain Python: the finaliser maps seed 0 to state 0, whose outputs are published."""
    mask = 2**64 - 1
    state = 0
    expected = []
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z = z ^ (z >> 31)
        expected.append((z & (2**23 - 1)) / 2**23)
    assert uniform(torch.tensor(0), torch.tensor([1, 2])).tolist() == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.9, "top_k": 12}], ids=str)
def test_first_tokens_have_the_distribution_of_the_module(qwen3, options):
    """4,000 first tokens of one prompt against its softmax: a chi-square test."""
    n = 4000
    prompt = Prompt([9, 10, 11])
    with torch.no_grad():
        logits = module_logits(qwen3, prompt, None, [0])
    probs = shape_logits(logits, Sampling(**options)).softmax(-1)[0]
    sampling = Sampling(max_new_tokens=1, **options)
    completions = decode(qwen3, [prompt] * n, None, sampling, range(n), slots=500)
    tokens = torch.tensor([completion.ids[0] for completion in completions])
    counts = torch.bincount(tokens, minlength=VOCABULARY_SIZE).float()
    assert counts[probs == 0].sum() == 0

    often = probs * n >= 5
    expected = (n * probs)[often]
    chi2 = ((counts[often] - expected) ** 2 / expected).sum()
    freedom = int(often.sum()) - 1
    assert freedom > 3
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FILTERS, ids=str)
@torch.no_grad()
def test_training_scores_the_distribution_that_was_sampled(qwen3, options):
    prompts, prefixes = make_rows(24, seed=4)
    sampling = Sampling(max_new_tokens=20, **options)
    completions = decode(qwen3, prompts, prefixes, sampling, range(24), slots=8)
    ids = ids_of(completions)
    logprobs, entropy = completion_logprobs(qwen3, prompts, ids, prefixes, sampling)
    assert (logprobs - logprobs_of(completions)).abs().max() <= 1e-5

    entropies = entropy.split([len(row) for row in ids])
    for prompt, prefix, row, entropy_of_row in zip(prompts, prefixes, ids, entropies):
        logits = module_logits(qwen3, prompt, prefix, row)
        probs = shape_logits(logits, sampling).softmax(-1)
        expected = torch.special.entr(probs).sum(-1)
        assert (entropy_of_row - expected).abs().max() < 1e-5


def test_the_token_that_was_sampled_is_always_kept():
    logits = torch.randn(40, VOCABULARY_SIZE)
    chosen = torch.randint(VOCABULARY_SIZE, (40,))
    kept = shape_logits(logits, Sampling(top_k=2), chosen) > prefix_file.DROPPED
    assert kept.gather(1, chosen[:, None]).all()
    assert (kept.sum(-1) <= 3).all()


@pytest.mark.parametrize("chunk", [7 * VOCABULARY_SIZE, 2**25], ids=["chunks", "one chunk"])
@pytest.mark.parametrize(
    "name, frozen_head, top_p",
    [("qwen3", False, 1.0), ("qwen2", False, 1.0), ("qwen2", True, 1.0), ("qwen3", False, 0.9)],
    ids=["tied", "untied", "frozen head", "filter"],
)
def test_gradients_equal_plain_autograd(name, frozen_head, top_p, chunk, monkeypatch):
    """Of weights and prefixes; also with small chunks of the head, and a row without completion."""
    model = build(name)
    model.lm_head.weight.requires_grad_(not frozen_head)
    sampling = Sampling(temperature=0.7, top_p=top_p)
    prompts, prefixes = make_rows(9, seed=5)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for prefix in prefixes:
        if prefix is not None and len(prefix):
            leaves.append(prefix.requires_grad_())
    completions = ids_of(decode(model, prompts, prefixes, Sampling(max_new_tokens=9), range(9)))
    completions[2] = []

    monkeypatch.setattr(prefix_file, "CHUNK", chunk)
    logprobs, entropy = completion_logprobs(model, prompts, completions, prefixes, sampling)
    assert not entropy.requires_grad
    weights = torch.randn(len(logprobs))
    gradients = torch.autograd.grad((logprobs * weights).sum(), leaves)

    plain = module_logprobs(model, prompts, prefixes, completions, 0.7, top_p)
    assert (logprobs - plain).abs().max() <= 1e-5
    expected = torch.autograd.grad((plain * weights).sum(), leaves)
    for gradient, other in zip(gradients, expected):
        assert (gradient - other).abs().max() <= 1e-4 * max(1, other.abs().max())


def make_groups():
    """Three groups of four rollouts: unguided, under one prefix, half of each; with completions."""
    generator = torch.Generator().manual_seed(7)
    prompts, prefixes, completions = [], [], []
    common = 0.5 * torch.randn(4, WIDTH, generator=generator)
    guides = [[None] * 4, [common] * 4, [None, None, common + 0.1, common - 0.1]]
    for length, guides_of_group in zip((12, 1, 7), guides):
        ids = torch.randint(6, VOCABULARY_SIZE, (length,), generator=generator).tolist()
        for i, prefix in enumerate(guides_of_group):
            prompts.append(Prompt(ids))
            prefixes.append(prefix)
            completions.append(torch.randint(6, 90, (1 + 5 * i,), generator=generator).tolist())
    completions[5] = []
    order = torch.randperm(12, generator=generator).tolist()  # groups need not stand together
    return (
        [prompts[i] for i in order],
        [prefixes[i] for i in order],
        [completions[i] for i in order],
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prompt_computed_once_gives_the_same(name, checkpointing):
    """Log-probs, entropies, gradients of weights and prefixes; with fewer tokens in the layers."""
    model = build(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            layer.training = True
    prompts, prefixes, completions = make_groups()
    leaves = list(model.parameters())
    for prefix in prefixes:
        if prefix is not None and not any(prefix is leaf for leaf in leaves):
            leaves.append(prefix.requires_grad_())
    tokens_seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, arguments: tokens_seen.append(arguments[0].shape[:2].numel())
    )

    results = []
    for share in (True, False):
        tokens_seen.clear()
        logprobs, entropy = completion_logprobs(
            model, prompts, completions, prefixes, Sampling(temperature=0.8), share=share
        )
        tokens = tokens_seen[0]
        weights = torch.linspace(-1, 1, len(logprobs))
        gradients = torch.autograd.grad((logprobs * weights).sum(), leaves)
        results.append((tokens, logprobs, entropy, gradients))
    (tokens, logprobs, entropy, gradients), (all_tokens, plain, plain_entropy, expected) = results

    once = (12 - 1) + (4 + 1 - 1) + (7 - 1) + 2 * (4 + 7 - 1)  # the stems
    each = sum(len(completion) for completion in completions)  # last prompt token .. last but one
    assert tokens == once + each
    assert all_tokens > 1.5 * tokens
    assert (logprobs - plain).abs().max() <= 1e-5
    assert (entropy - plain_entropy).abs().max() <= 1e-5
    for gradient, other in zip(gradients, expected):
        assert (gradient - other).abs().max() <= 1e-5 * max(1, other.abs().max())


@torch.no_grad()
def test_a_model_that_has_shared_still_heeds_the_masks_of_others():
    model, fresh = build(), build()
    completion_logprobs(model, [Prompt([7, 8])] * 2, [[9], [9]], None)
    ids = torch.randint(6, VOCABULARY_SIZE, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0  # pads on the left
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits, fresh(input_ids=ids, attention_mask=mask).logits)


def test_what_is_not_shared_is_computed_plainly(qwen3, monkeypatch):
    """Equal prefixes that are two tensors may have two gradients."""
    monkeypatch.setattr(prefix_file, "shared_hidden_states", None)  # a call would fail
    prefixes = [torch.zeros(2, WIDTH), torch.zeros(2, WIDTH)]
    completion_logprobs(qwen3, [Prompt([7, 8])] * 2, [[9], [9]], prefixes)


@needs_onednn
@pytest.mark.parametrize("frozen", ["", "weight", "x"])
def test_gradients_through_onednn_equal_those_of_torch(frozen, monkeypatch):
    monkeypatch.setattr(prefix_file, "IS_AMD", True)
    monkeypatch.setattr(prefix_file, "ONEDNN_FROM", 0)
    layer = prefix_file.FastLinear(48, 80)
    layer.weight.requires_grad_(frozen != "weight")
    x = torch.randn(2, 7, 48, requires_grad=frozen != "x")
    leaves = [leaf for leaf in (x, layer.weight, layer.bias) if leaf.requires_grad]
    factor = torch.randn(2, 7, 80)

    y = layer(x)
    assert "OneDNN" in type(y.grad_fn).__name__
    gradients = torch.autograd.grad((y * factor).sum(), leaves)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    expected = torch.autograd.grad((plain * factor).sum(), leaves)
    assert (y - plain).abs().max() < 1e-5
    for gradient, other in zip(gradients, expected):
        assert (gradient - other).abs().max() < 1e-4


def test_onednn_leaves_autocast_other_dtypes_and_small_matrices_to_torch(monkeypatch):
    monkeypatch.setattr(prefix_file, "IS_AMD", True)
    serves = prefix_file.OneDNNLinear.serves
    x, weight = torch.randn(2, 512), torch.randn(512, 512)
    assert not serves(x.bfloat16(), weight.bfloat16())
    assert not serves(x, weight[:8])
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(x, weight)
    monkeypatch.setattr(prefix_file, "IS_AMD", False)
    assert not serves(x, weight)


def test_training_under_autocast_stays_near_fp32_with_fp32_gradients():
    model = build()
    prompts, prefixes = make_rows(6)
    completions = [[7, 8, 9]] * 6
    with torch.no_grad():
        exact, _ = completion_logprobs(model, prompts, completions, prefixes)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = completion_logprobs(model, prompts, completions, prefixes)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 0.3
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 2])
def test_a_micro_batch_without_a_token_has_a_backward_pass(qwen3, count):
    prompts = [Prompt([9]), Prompt([9, 10])][:count]
    completions = [[], []][:count]
    logprobs, entropy = completion_logprobs(qwen3, prompts, completions, None, with_entropy=False)
    assert logprobs.shape == (0,)
    assert entropy is None
    gradients = torch.autograd.grad(logprobs.sum(), qwen3.model.layers[0].mlp.up_proj.weight)
    assert gradients[0].abs().sum() == 0


def test_micro_batches_hold_every_row_once_and_as_many_as_fit():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (100,), generator=generator).tolist() + [500]
    groups = micro_batches(lengths, 200)
    order = sum(groups, [])
    assert sorted(order) == list(range(101))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    assert groups[0] == [100]  # too long: it stands alone
    for group in groups:
        assert len(group) == 1 or len(group) * lengths[group[0]] <= 200
    for group in groups[:-1]:
        assert (len(group) + 1) * lengths[group[0]] > 200
    assert micro_batches([3, 9, 4], 9) == [[1], [2, 0]]
    assert micro_batches([], 9) == []


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_bad_sampling_is_refused(options):
    with pytest.raises(ValueError, match="out of range"):
        Sampling(**options)


@pytest.mark.parametrize(
    "ids, prefixes, message",
    [
        ([[9], []], None, "prompt 1 is empty"),
        ([[9]], [torch.zeros(2, 3)], r"prefix 0 has shape \[2, 3\], not \[L, 64\]"),
        ([[9]], [torch.zeros(WIDTH)], "prefix 0 has shape"),
        ([[9]], [None, None], "1 prompts and 2 prefixes"),
    ],
)
def test_bad_rows_are_refused_by_decoder_and_training_alike(qwen3, ids, prefixes, message):
    prompts = [Prompt(row) for row in ids]
    with pytest.raises(ValueError, match=message):
        Decoder(qwen3).embed(prompts, prefixes)
    with pytest.raises(ValueError, match=message):
        embed_rows(qwen3, qwen3.get_input_embeddings().weight, prompts, prefixes)
    with pytest.raises(ValueError, match=message):
        completion_logprobs(qwen3, prompts, [[9]] * len(prompts), prefixes)


def test_bad_calls_are_refused(qwen3):
    decoder = Decoder(qwen3)
    prompts = [Prompt([9]), Prompt([9])]
    with pytest.raises(ValueError, match="2 rows and 1 seeds"):
        decoder.generate(decoder.embed(prompts), seeds=[1])
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        completion_logprobs(qwen3, prompts, [[8]], None)
    with pytest.raises(ValueError, match="slots is 0"):
        Decoder(qwen3, slots=0)


def refused_models():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return [
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)),
        build("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        build("llama", hidden_act="gelu"),
        build("llama", rope_parameters=dynamic),
    ]


@pytest.mark.parametrize("model", refused_models(), ids=["gpt2", "sliding", "gelu", "dynamic"])
def test_models_that_would_be_computed_wrongly_are_refused(model):
    with pytest.raises(ValueError, match="is not served: use one of qwen3, qwen2, llama"):
        Decoder(model)
    with pytest.raises(ValueError, match="is not served"):
        completion_logprobs(model, [Prompt([9])], [[9]], None)
