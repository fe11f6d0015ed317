"""sft.py: the loss under a prefix, metrics by name, run folders, exact resume, settings."""

import json
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import sft
from prefix import Palette, Prompt, load_policy
from sft import (
    Control,
    PrefixDraws,
    Ranks,
    Run,
    SFTConfig,
    answer_ids,
    default_lengths,
    lm_step,
    measure_control,
    pairs_of,
    posterior_of,
    rows_of_step,
    seed_of,
    warm_up,
)
from tiny_world import VOCABULARY
from vae import Reader, result_settings

ALONE = Ranks.alone()
WORD_ID = {word: i for i, word in enumerate(VOCABULARY)}
END = "<end>"


@pytest.fixture
def pairs(reader, traces):
    return [answer_ids(trace, reader, "auto", 64) for trace in traces[:8]]


@pytest.fixture
def prefixes(model, vae):
    """Eight: none for the even rows, one of two rows for the odd ones."""
    palette = Palette(vae, table_of(model), "prior", 2)
    prefixes = [None] * 8
    for i in (1, 3, 5, 7):
        prefixes[i] = palette.draw(i).embeddings
    return prefixes


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "r", {"lr": 1.0}, ALONE)


def table_of(model):
    return model.get_input_embeddings().weight.detach()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(gradients_of_one, gradients_of_other):
    assert gradients_of_one.keys() == gradients_of_other.keys()
    for name, gradient in gradients_of_one.items():
        other = gradients_of_other[name]
        torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-4, msg=name)


def assert_same_weights(model, other):
    weights = other.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def settings(**changes):
    """The SFTConfig of a small warm-up; its names are of nothing."""
    values = {"model": "m", "vae": "v", "traces": ["t"], "out": "o", "steps": 5, "batch": 6}
    values |= {"lr": 1e-3, "max_tokens": 64, "tokens_per_batch": 512, "save_every": 2}
    return SFTConfig(**{**values, **changes})


# ---- The loss ------------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers_on_answer_tokens_with_the_end(model, pairs, prefixes):
    loss_sum, answer_tokens = lm_step(model, pairs, prefixes, ALONE)
    ours = gradients(model)
    model.zero_grad()

    embed = model.get_input_embeddings()
    total = 0.0
    count = 0
    for (prompt, answer), prefix in zip(pairs, prefixes):
        assert answer[-1] == WORD_ID[END]
        if prefix is None:
            prefix = torch.zeros(0, 128)
        inputs = torch.cat([prefix, embed(torch.tensor(prompt.ids + answer))])
        unscored = [-100] * (len(prefix) + len(prompt.ids))
        labels = torch.tensor([unscored + answer])
        total = total + model(inputs_embeds=inputs[None], labels=labels).loss * len(answer)
        count += len(answer)
    (total / count).backward()

    assert answer_tokens == count
    assert loss_sum == pytest.approx(total.item(), rel=1e-5)
    assert_gradients(ours, gradients(model))


def test_the_gradient_does_not_depend_on_the_micro_batches(model, pairs, prefixes):
    results = []
    for tokens_per_batch in (1, 120, 100_000):  # one row, about three rows, all rows
        model.zero_grad()
        lm_step(model, pairs, prefixes, ALONE, tokens_per_batch)
        results.append(gradients(model))
    assert_gradients(results[0], results[1])
    assert_gradients(results[0], results[2])


def test_micro_batches_are_cut_by_the_length_of_prefix_prompt_and_answer(
    model, pairs, prefixes, monkeypatch
):
    original = sft.micro_batches
    calls = []

    def micro_batches(lengths, max_tokens):
        calls.append((lengths, max_tokens))
        return original(lengths, max_tokens)

    monkeypatch.setattr(sft, "micro_batches", micro_batches)
    lm_step(model, pairs, prefixes, ALONE, 120)
    lengths = []
    for i, (prompt, answer) in enumerate(pairs):
        lengths.append(2 * (i % 2) + len(prompt.ids) + len(answer))
    assert calls == [(lengths, 120)]


def test_the_end_token_is_learnt_even_where_it_is_also_the_pad_token(model):
    """Bug 1 of design.md: pad == EOS must not mask EOS out of the loss."""
    short = (Prompt([WORD_ID["calc"]]), [WORD_ID["so"], WORD_ID[END]])
    long = (Prompt([WORD_ID["calc"]] * 5), [WORD_ID["thus"]] * 4 + [WORD_ID[END]])
    model.config.pad_token_id = WORD_ID[END]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(15):
        lm_step(model, [short, long], [None, None], ALONE)
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.tensor([[WORD_ID["calc"], WORD_ID["so"]]])
    assert model(input_ids=ids).logits[0, -1].argmax().item() == WORD_ID[END]


def test_every_rank_divides_by_the_answer_tokens_of_all_ranks(model, pairs, prefixes):
    """Bug 3 of design.md: two ranks with uneven shares. Their gradients add up to one rank's."""
    _, answer_tokens = lm_step(model, pairs, prefixes, ALONE)
    expected = gradients(model)
    model.zero_grad()

    class OneOfTwo(Ranks):
        def all_reduce_sum(self, numbers):
            return [answer_tokens]

    rank = OneOfTwo.alone()
    lm_step(model, pairs[:3], prefixes[:3], rank)
    lm_step(model, pairs[3:], prefixes[3:], rank)
    assert_gradients(expected, gradients(model))


def test_answers_carry_their_end_token_and_long_prompts_are_left_out(tokenizer, reader):
    trace = {"question": "calc 1 + 1 ?", "answer": "so 2"}
    prompt, answer = answer_ids(trace, reader, "auto", 64)
    assert tokenizer.decode(prompt.ids) == "<q> calc 1 + 1 ? <a>"
    assert tokenizer.decode(answer) == "so 2 <end>"
    assert answer_ids(trace, reader, "auto", 5) is None  # the prompt has 7 tokens
    long = {**trace, "answer": "so 2 " * 20}
    _, answer = answer_ids(long, reader, "auto", 20)
    assert len(answer) == 20
    assert answer[-1] != WORD_ID[END]  # it was cut: it does not end there


class ByteTokenizer:
    """One token a byte, and no chat template."""

    chat_template = None
    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}


def test_a_plain_prompt_and_its_answer_are_parted_by_a_space():
    trace = {"question": "1 + 1 ?", "answer": "2"}
    prompt, answer = answer_ids(trace, Reader(ByteTokenizer()), "auto", 64)
    assert bytes(prompt.ids + answer[:-1]).decode() == "Question: 1 + 1 ?\nAnswer: 2"
    assert answer[-1] == 0


# ---- The optimizer step --------------------------------------------------------------------------


@pytest.mark.parametrize("norm, step", [(0.01, 0.01), (100.0, 1.0)])
def test_gradients_are_clipped_at_norm_1_and_cleared(norm, step):
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.grad = torch.full((1, 1), norm)
    before = linear.weight.item()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    assert sft.apply_gradients(linear, [optimizer], ALONE) == pytest.approx(norm)
    assert before - linear.weight.item() == pytest.approx(step, rel=1e-4)
    assert linear.weight.grad is None


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_whole():
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.grad = torch.full((1, 1), float("nan"))
    before = linear.weight.item()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="not finite"):
        sft.apply_gradients(linear, [optimizer], ALONE)
    assert linear.weight.item() == before


def test_checkpointing_runs_layers_again_and_changes_no_gradient(policy_folder, pairs):
    """Our policies are in eval mode, in which transformers would ignore gradient checkpointing."""
    results = {}
    calls = {}
    for checkpointing in (False, True):
        config = settings(checkpointing=checkpointing)
        model, _ = sft.load_trainable(str(policy_folder), ALONE, config)
        calls[checkpointing] = 0

        def count(*_, checkpointing=checkpointing):
            calls[checkpointing] += 1

        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(count)
        lm_step(model, pairs, [None] * 8, ALONE)
        results[checkpointing] = gradients(model)

        for layer in model.model.layers:
            modules = [module for module in layer.modules() if module is not layer]
            assert not any(module.training for module in modules)
    assert calls == {False: 2, True: 4}
    assert_gradients(results[False], results[True])


def test_seeds_are_fixed_and_distinct():
    assert seed_of(0, "rollout", 1, 2) == 5822439037807486020
    seeds = set()
    for seed in range(5):
        for step in range(20):
            for row in range(20):
                seeds.add(seed_of(seed, "rollout", step, row))
    assert len(seeds) == 2000
    assert min(seeds) >= 0


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own():
    rows = list(range(10))
    steps = [rows_of_step(rows, step, 5, seed=3) for step in range(4)]
    first_epoch = steps[0] + steps[1]
    second_epoch = steps[2] + steps[3]
    assert sorted(first_epoch) == sorted(second_epoch) == rows
    assert first_epoch != second_epoch
    assert rows_of_step(rows, 1, 5, seed=3) == steps[1]  # no state between calls
    assert rows_of_step(rows, 1, 5, seed=4) != steps[1]
    assert len(rows_of_step(rows, 0, 25, seed=3)) == 25  # more than an epoch


def test_replacements_are_the_other_rows_and_leave_the_epoch_as_it_is():
    rows = list(range(12))
    first = rows_of_step(rows, 0, 4, seed=3, extra=2)
    second = rows_of_step(rows, 1, 4, seed=3, extra=2)
    assert sorted(first) == sorted(second) == rows  # 4 + 2 x 4, none twice
    assert first[:4] == rows_of_step(rows, 0, 4, seed=3)
    assert first[4:] != second[4:]
    assert len(rows_of_step(rows, 0, 12, seed=3, extra=1)) == 24  # no other left: asked again


# ---- Metrics by name -----------------------------------------------------------------------------


def test_metrics_are_means_by_name_over_all_guided_and_unguided_items():
    sums = {}
    one = {"tokens": torch.ones(3), "kl": torch.tensor([1.0, 2.0, 6.0])}
    two = {"tokens": torch.ones(1), "kl": torch.tensor([7.0])}
    sft.add_metrics(sums, one, [False, True, True])
    sft.add_metrics(sums, two, [False])
    assert sft.mean_metrics(sums, "tokens", ALONE) == {
        "tokens": 4,
        "tokens_guided": 2,
        "tokens_unguided": 2,
        "kl": 4.0,
        "kl_guided": 4.0,
        "kl_unguided": 4.0,
    }


def test_each_metric_keeps_its_own_values_wherever_it_stands():
    """Two that are swapped in their order are not swapped in the file; a mean over none is None."""
    values = {"reward": torch.tensor([1.0, 0.0]), "rollouts": torch.ones(2)}
    values["stopped"] = torch.tensor([True, True])
    sums = {}
    sft.add_metrics(sums, values, [True, True])
    row = sft.mean_metrics(sums, "rollouts", ALONE)
    assert (row["reward"], row["stopped"], row["rollouts"]) == (0.5, 1.0, 2)
    assert (row["reward_unguided"], row["rollouts_unguided"]) == (None, 0)


def test_sums_are_in_double_precision():
    sums = {}
    for _ in range(3):
        sft.add_metrics(sums, {"n": torch.ones(1), "x": torch.tensor([2.0**24 + 2])}, [True])
    sft.add_metrics(sums, {"n": torch.ones(1), "x": torch.ones(1)}, [True])
    assert sums["x"].tolist() == [0.0, 3 * 2.0**24 + 7]


# ---- Exact resume --------------------------------------------------------------------------------


POSTERIOR = {"source": "posterior", "lengths": [1, 2, 4, 8], "unguided": 0.3}


def warm(folder, policy_folder, vae, traces, resume=False, stop_after=None, **changes):
    """A warm-up of five steps in a folder; stop_after: it dies after so many optimizer steps.

    Returns the model, and the rows of metrics.jsonl without their times.
    """
    model, reader = load_policy(str(policy_folder))
    config = settings(**{"source": "prior", "lengths": [1], **changes})
    posterior = None
    if config.source == "posterior":
        posterior = posterior_of(traces, reader, model, table_of(model), vae)
    prefix_draws = PrefixDraws(vae, table_of(model), config, posterior)
    pairs = pairs_of(traces, reader, config)
    run = Run(folder, result_settings(config), ALONE, resume=resume)
    original = sft.apply_gradients
    steps = 0

    def apply_gradients(*arguments):
        nonlocal steps
        if steps == stop_after:
            raise KeyboardInterrupt
        steps += 1
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "apply_gradients", apply_gradients)
        warm_up(model, reader, pairs, prefix_draws, run, config)
    return model, metrics_of(folder)


def metrics_of(folder):
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        row.pop("seconds", None)
        rows.append(row)
    return rows


@pytest.fixture
def undisturbed(tmp_path, policy_folder, vae, traces):
    return warm(tmp_path / "undisturbed", policy_folder, vae, traces)


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    tmp_path, policy_folder, vae, traces, undisturbed, stop_after
):
    model, metrics = undisturbed
    with pytest.raises(KeyboardInterrupt):
        warm(tmp_path / "torn", policy_folder, vae, traces, stop_after=stop_after)
    resumed, resumed_metrics = warm(tmp_path / "torn", policy_folder, vae, traces, resume=True)
    assert len(metrics) == 5
    assert resumed_metrics == metrics
    assert_same_weights(model, resumed)


def test_a_resumed_warm_up_from_the_posterior_equals_an_undisturbed_one(
    tmp_path, policy_folder, vae, traces
):
    model, metrics = warm(tmp_path / "whole", policy_folder, vae, traces, **POSTERIOR)
    with pytest.raises(KeyboardInterrupt):
        warm(tmp_path / "torn", policy_folder, vae, traces, stop_after=3, **POSTERIOR)
    resumed, resumed_metrics = warm(
        tmp_path / "torn", policy_folder, vae, traces, resume=True, **POSTERIOR
    )
    assert resumed_metrics == metrics
    assert_same_weights(model, resumed)
    prior, _ = warm(tmp_path / "prior", policy_folder, vae, traces)
    assert not torch.equal(table_of(prior), table_of(model))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path, policy_folder, vae, traces, undisturbed, capsys
):
    with pytest.raises(KeyboardInterrupt):
        warm(tmp_path / "torn", policy_folder, vae, traces, stop_after=4)
    newest = tmp_path / "torn" / "checkpoint-000004"
    (newest / sft.tensor_file(0)).write_bytes(b"torn")
    resumed, metrics = warm(tmp_path / "torn", policy_folder, vae, traces, resume=True)
    assert "checkpoint-000004 cannot be read" in capsys.readouterr().out
    assert metrics == undisturbed[1]
    assert_same_weights(undisturbed[0], resumed)


def make_optimizers(model):
    """Muon for matrices, AdamW for the rest, as the bases are pretrained."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]


def test_moments_come_back_with_the_weights_to_their_own_optimizer(run, model):
    """Bug 7 of design.md, to the bit."""
    optimizers = make_optimizers(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    sft.apply_gradients(model, optimizers, ALONE)
    run.save(1, model, optimizers)
    expected = sft.checkpoint_tensors(model, optimizers)
    expected = {name: tensor.clone() for name, tensor in expected.items()}

    for p in model.parameters():
        p.data.fill_(float("nan"))
    optimizers = make_optimizers(model)
    assert run.restore(model, optimizers) == 1
    restored = sft.checkpoint_tensors(model, optimizers)
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(restored[name], tensor), name
    moments = {name.rpartition(".")[2] for name in restored}
    assert moments >= {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.01, 0.01]


def test_the_warm_up_draws_fresh_traces_and_latents_at_every_step(
    tmp_path, policy_folder, vae, traces, reader, monkeypatch
):
    """By their own seeds: row i of a step has the same on any number of ranks."""
    batches = []
    latents = []

    def remember(model, pairs, prefixes, *_):
        batches.append([prompt.ids + answer for prompt, answer in pairs])
        latents.append(prefixes)
        return 1.0, 1

    monkeypatch.setattr(sft, "lm_step", remember)
    monkeypatch.setattr(sft, "apply_gradients", lambda *_: 0.0)
    model, _ = warm(tmp_path / "r", policy_folder, vae, traces)
    assert len({str(batch) for batch in batches}) == 5
    rows = [tuple(prefix.flatten().tolist()) for prefixes in latents for prefix in prefixes]
    assert len(rows) == len(set(rows)) == 5 * 6
    palette = Palette(vae, table_of(model), "prior", 1)
    expected = palette.draw(seed_of(0, "sft prefix", 3, 2)).embeddings
    assert torch.equal(latents[3][2], expected)
    rng = random.Random(seed_of(0, "sft batch", 3))
    pairs = pairs_of(traces, reader, settings())
    numbers = rng.choices(list(pairs), k=6)
    expected = []
    for number in numbers:
        prompt, answer = pairs[number]
        expected.append(prompt.ids + answer)
    assert batches[3] == expected


# ---- Prefixes from the trace's own latent --------------------------------------------------------


def draws_of(traces, reader, model, vae, **changes):
    """The PrefixDraws of a warm-up on these traces."""
    config = settings(**{**POSTERIOR, "unguided": 0.0, **changes})
    table = table_of(model)
    return PrefixDraws(vae, table, config, posterior_of(traces, reader, model, table, vae))


def test_the_prefix_of_a_row_is_drawn_from_the_posterior_of_its_own_trace(
    model, reader, traces, vae
):
    """z = mu + sigma * epsilon of h, the mean embedding of question and answer, tiled to L rows."""
    table = table_of(model)
    draws = draws_of(traces, reader, model, vae, lengths=[4])
    prefix = draws.draw(step=2, row=3, number=7)  # [4, d]

    text = f"{traces[7]['question']} {traces[7]['answer']}"
    ids = torch.tensor(reader.tokenizer(text, add_special_tokens=False)["input_ids"])
    mu, log_var = vae.encode(table[ids].mean(0, keepdim=True))
    generator = torch.Generator().manual_seed(seed_of(0, "sft prefix", 2, 3))
    z = mu + torch.exp(log_var / 2) * torch.randn(vae.latent, generator=generator)
    torch.testing.assert_close(prefix, vae.decode(z).expand(4, -1), atol=1e-5, rtol=1e-4)


def test_a_trace_whose_answer_changes_gets_another_latent_and_all_others_keep_theirs(
    model, reader, traces, vae
):
    changed = [dict(trace) for trace in traces]
    changed[7]["answer"] = traces[8]["answer"]
    before = draws_of(traces, reader, model, vae)
    after = draws_of(changed, reader, model, vae)
    for number in (6, 7, 8):
        same = torch.equal(before.draw(0, 0, number), after.draw(0, 0, number))
        assert same == (number != 7)


def test_every_row_draws_its_latent_its_length_and_whether_it_has_a_prefix(
    model, reader, traces, vae
):
    draws = draws_of(traces, reader, model, vae, unguided=0.25)
    lengths = []
    first_rows = []
    for row in range(400):
        prefix = draws.draw(1, row, 7)
        assert prefix is None or torch.equal(prefix, draws.draw(1, row, 7))  # no state between
        lengths.append(0 if prefix is None else len(prefix))
        if prefix is not None:
            first_rows.append(tuple(prefix[0].tolist()))
    assert len(set(first_rows)) == len(first_rows)  # one trace, another z each time
    shares = [lengths.count(length) / 400 for length in (0, 1, 2, 4, 8)]
    assert shares == pytest.approx([0.25, 0.1875, 0.1875, 0.1875, 0.1875], abs=0.06)


def test_a_vae_of_another_table_encodes_no_traces(model, reader, traces, vae):
    with pytest.raises(ValueError, match="another embedding table"):
        posterior_of(traces, reader, model, table_of(model).flip(0), vae)


def test_every_tenth_trace_is_not_trained_on(reader, traces):
    pairs = pairs_of(traces, reader, settings())
    assert sorted(pairs) == [number for number in range(300) if number % 10 != 9]


# ---- Control -------------------------------------------------------------------------------------


def test_losses_of_control_are_those_of_transformers_on_held_out_answers(
    model, reader, traces, vae
):
    """Every tenth trace; under its domain's prefix, its own mean latent, and without."""
    control = measure_control(model, reader, vae, traces, 4, ("own",), answers=3)
    number = 19  # the second held-out trace of its domain is the fifth of all
    domain = traces[number]["domain"]
    of_domain = [i for i in range(9, 300, 10) if traces[i]["domain"] == domain]
    place = of_domain.index(number)
    prompt, answer = answer_ids(traces[number], reader, "auto", 64)
    posterior = posterior_of([traces[number]], reader, model, table_of(model), vae)
    palette = Palette(vae, table_of(model), domain, 4)
    seed = seed_of("control", number)
    prefixes = {
        "none": torch.zeros(0, 128),
        domain: palette.draw(seed).embeddings,
        "own": vae.decode(posterior.mu).expand(4, -1),
    }
    for source, prefix in prefixes.items():
        embedded = model.get_input_embeddings()(torch.tensor(prompt.ids + answer))
        inputs = torch.cat([prefix, embedded])
        labels = [-100] * (len(prefix) + len(prompt.ids)) + answer
        with torch.no_grad():
            loss = model(inputs_embeds=inputs[None], labels=torch.tensor([labels])).loss
        assert control.losses[domain][source][place] == pytest.approx(loss.item(), rel=1e-4)
    for losses in control.losses.values():
        assert list(losses) == ["none", *vae.domains, "own"]
        assert {len(values) for values in losses.values()} == {3}


def test_answers_of_control_are_cut_and_a_domain_without_any_has_none(
    model, reader, traces, vae, monkeypatch
):
    long = measure_control(model, reader, vae, traces, 1, answers=2)
    monkeypatch.setattr(sft, "LONGEST_ANSWER", 8)
    short = measure_control(model, reader, vae, traces, 1, answers=2)
    assert short.losses["math"]["none"] != long.losses["math"]["none"]
    assert measure_control(model, reader, vae, traces[:20], 1) is None  # one held out, of 3 domains


def losses_of(none, own, other):
    """Two domains whose answers have these losses without, and under either domain's prefix."""
    return {
        "a": {"none": [none, none], "a": [own, own], "b": [other, other]},
        "b": {"none": [none], "a": [other], "b": [own]},
    }


@pytest.mark.parametrize(
    "losses, verdict",
    [
        (losses_of(1.0, 5.1, 5.0), "raise the loss of held-out answers by 4.10 nats a token: warm"),
        (losses_of(1.0, 1.2, 1.2), "by +0.20 .* no likelier .*they do not steer"),
        (losses_of(1.0, 0.4, 1.1), "by -0.60 .* latents steer: .* 0.70 nats a token likelier"),
        ({"a": {"none": [1.0], "a": [0.9]}}, "by -0.10 .*; with one domain there is nothing"),
    ],
)
def test_the_verdict_says_what_prefixes_cost_and_whether_they_steer(losses, verdict):
    assert re.search(verdict.replace("+", r"\+"), Control(losses).verdict())


def test_domains_weigh_the_same_and_gains_are_paired_by_answer():
    losses = losses_of(1.0, 0.4, 1.1)
    losses["b"]["a"] = [3.0]
    control = Control(losses)
    assert control.gains() == [pytest.approx([0.7, 0.7]), pytest.approx([2.6])]
    assert sft.mean_of_domains(control.gains()) == pytest.approx(1.65)
    assert control.costs() == [pytest.approx([-0.6, -0.6]), pytest.approx([-0.6])]


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_only_the_two_newest_checkpoints_are_kept(run, model):
    for step in (1, 2, 3):
        run.save(step, model, [])
    names = [path.name for path in run.checkpoints()]
    assert names == ["checkpoint-000002", "checkpoint-000003"]


def test_a_run_without_a_readable_checkpoint_is_refused_and_keeps_what_it_has(run, model):
    """As one that another version of this file has left: from step 0 its metrics would be lost."""
    run.log("metrics", {"step": 1})
    run.save(1, model, [])
    (run.folder / "checkpoint-000001" / "state.json").write_text('{"step": 1}')
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read here \('crc32'\)"):
        run.restore(model, [])
    assert (run.folder / "metrics.jsonl").read_text()
    assert len(run.checkpoints()) == 1


def test_an_unreadable_checkpoint_is_not_kept_in_place_of_the_next_one(run, model):
    for step in (2, 4):
        run.save(step, model, [])
    (run.folder / "checkpoint-000004" / "state.json").write_text("torn")
    assert run.restore(model, []) == 2
    run.save(3, model, [])  # --save-every may be another now
    names = [path.name for path in run.checkpoints()]
    assert names == ["checkpoint-000002", "checkpoint-000003"]


def test_a_checkpoint_with_a_missing_or_changed_file_is_refused(run, model):
    """A lost page leaves zeros, which are tensors as good as any: the checksum tells."""
    run.save(1, model, [])
    path = run.folder / "checkpoint-000001" / sft.tensor_file(0)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match="its files are not as they were saved"):
        sft.read_checkpoint(path.parent, model, [], ALONE)
    lost_page = content[:-8192] + bytes(4096) + content[-4096:]
    for changed in (content[:-1], lost_page):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="its files are not as they were saved"):
            sft.read_checkpoint(path.parent, model, [], ALONE)
    path.write_bytes(content)
    assert sft.read_checkpoint(path.parent, model, [], ALONE) == 1


def test_a_checkpoint_of_another_model_is_refused(run, model):
    run.save(1, model, [])
    model.model.norm.weight = torch.nn.Parameter(torch.ones(64))
    with pytest.raises(ValueError, match="no checkpoint in"):
        run.restore(model, [])


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(11, "Resource temporarily unavailable"), "[Errno 11]"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_set_aside_not_deleted(
    run, model, reader, monkeypatch, capsys, error, words
):
    original = sft.read_checkpoint
    for step in (1, 2):
        run.save(step, model, [])

    def read_checkpoint(folder, *arguments):
        if folder.name == "checkpoint-000002":
            raise error
        return original(folder, *arguments)

    monkeypatch.setattr(sft, "read_checkpoint", read_checkpoint)
    assert run.restore(model, []) == 1
    output = capsys.readouterr().out
    assert f"cannot be read ({words}" in output
    assert "is now" in output
    aside = run.folder / "unreadable-checkpoint-000002"
    assert (aside / sft.tensor_file(0)).is_file()
    run.finish(model, reader)
    assert names_in(run.folder) == ["config.json", "policy"]


def test_a_half_filled_folder_is_no_checkpoint(run, model):
    run.save(1, model, [])
    with pytest.raises(KeyboardInterrupt), run.new_folder("checkpoint-000002") as folder:
        assert folder.exists()
        assert [path.name for path in run.checkpoints()] == ["checkpoint-000001"]
        raise KeyboardInterrupt
    assert not folder.exists()
    assert run.restore(model, []) == 1


def test_a_save_that_fails_leaves_the_old_one_and_no_debris(run, model, monkeypatch):
    run.save(1, model, [])

    def write_tensors(folder, *_):
        (folder / "half").write_text("torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sft, "write_tensors", write_tensors)
    with pytest.raises(OSError, match="No space left"):
        run.save(2, model, [])
    assert names_in(run.folder) == ["checkpoint-000001", "config.json"]


def test_a_full_disk_is_an_oserror(run, model, monkeypatch):
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def write_data(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_data)
    with pytest.raises(OSError, match="No space left on device"):
        run.save(1, model, [])


def test_a_torn_last_line_is_dropped_on_resume(run, model):
    run.log("metrics", {"step": 1}, {"step": 2})
    run.save(2, model, [])
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "completion": "\\boxed{5}')
    (run.folder / "traces.jsonl").write_text('{"question": "not a metric"}\n')
    assert run.restore(model, []) == 2
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (run.folder / "traces.jsonl").read_text() == '{"question": "not a metric"}\n'


def test_without_a_checkpoint_a_resumed_run_starts_with_empty_logs(run, model):
    run.log("metrics", {"step": 0}, {"step": 1})
    assert run.restore(model, []) == 0
    assert (run.folder / "metrics.jsonl").read_text() == ""


# ---- The best policy -----------------------------------------------------------------------------


def best_of(run):
    """(step, score, the weight of the final norm) of best/."""
    best = json.loads((run.folder / "best" / "best.json").read_text())
    model, _ = load_policy(str(run.folder / "best"))
    (weight,) = model.model.norm.weight.unique().tolist()
    return best["step"], best["score"], weight


def reach(run, model, reader, step, score):
    model.model.norm.weight.data.fill_(step)
    run.keep_best(step, score, model, reader)


def test_the_best_policy_is_kept_the_earliest_of_equals(run, model, reader):
    for step, score in enumerate((0.2, 0.5, 0.5, 0.4), start=1):
        reach(run, model, reader, step, score)
    assert best_of(run) == (2, 0.5, 2)
    run.finish(model, reader)
    assert names_in(run.folder) == ["best", "config.json", "policy"]


def test_a_resumed_run_ends_with_the_best_policy_of_an_undisturbed_one(run, model, reader):
    """A best/ of a later step than the checkpoint stays: the repeat reaches the same score."""
    scores = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.6, 5: 0.6, 6: 0.7}
    for step in (1, 2, 3, 4):
        reach(run, model, reader, step, scores[step])
        if step == 2:
            run.save(step, model, [])
    again = Run(run.folder, {"lr": 1.0}, ALONE, resume=True)
    assert again.restore(model, []) == 2
    assert best_of(again) == (4, 0.6, 4)
    for step in (3, 4, 5):
        reach(again, model, reader, step, scores[step])
        assert best_of(again) == (4, 0.6, 4)
    reach(again, model, reader, 6, scores[6])
    assert best_of(again) == (6, 0.7, 6)


def test_a_best_policy_that_a_kill_took_away_is_made_again(run, model, reader):
    reach(run, model, reader, 2, 0.5)
    run.save(2, model, [])
    shutil.rmtree(run.folder / "best")  # between its two names, at step 3
    again = Run(run.folder, {"lr": 1.0}, ALONE, resume=True)
    again.restore(model, [])
    reach(again, model, reader, 3, 0.6)
    assert best_of(again) == (3, 0.6, 3)


# ---- Run folders ---------------------------------------------------------------------------------


def test_run_folders_refuse_other_settings_and_unfinished_runs(run, model, reader):
    with pytest.raises(ValueError, match="unfinished run: --resume"):
        Run(run.folder, {"lr": 1.0}, ALONE)
    with pytest.raises(ValueError, match=r"another lr \(was 1.0, now 2.0\)"):
        Run(run.folder, {"lr": 2.0}, ALONE, resume=True)
    assert not sft.is_finished(run.folder, {"lr": 1.0}, resume=True)
    run.finish(model, reader)
    assert sft.is_finished(run.folder, {"lr": 1.0})
    assert Run(run.folder, {"lr": 1.0}, ALONE).finished
    loaded, _ = load_policy(str(run.folder))
    assert_same_weights(loaded, model)


def test_a_folder_without_a_run_is_not_finished(tmp_path):
    assert not sft.is_finished(tmp_path / "nothing", {})


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(run, model):
    run.save(1, model, [])
    run.log("metrics", {"step": 1})
    run.log("samples", {"step": 1})
    (run.folder / "mine.jsonl").write_text("precious")
    Run(run.folder, {"lr": 2.0}, ALONE, overwrite=True)
    assert names_in(run.folder) == ["config.json", "mine.jsonl"]
    assert json.loads((run.folder / "config.json").read_text()) == {"lr": 2.0}


def test_overwrite_keeps_the_old_policies_until_the_new_run_is_finished(run, model, reader):
    reach(run, model, reader, 1, 0.9)
    run.finish(model, reader)
    for lr in (2.0, 3.0):  # the second overwrites a run that did not get far
        again = Run(run.folder, {"lr": lr}, ALONE, overwrite=True)
        assert names_in(run.folder) == ["config.json", "old-best", "old-policy"]
        old, _ = load_policy(str(run.folder / "old-policy"))
        assert_same_weights(old, model)
        assert not again.finished
    assert again.restore(model, []) == 0
    reach(again, model, reader, 1, 0.1)  # the old run's score is none of the new one's
    assert best_of(again)[1] == 0.1
    again.finish(model, reader)
    assert names_in(run.folder) == ["best", "config.json", "policy"]


def test_a_kill_while_overwriting_leaves_no_checkpoint_to_other_settings(run, model, monkeypatch):
    run.save(1, model, [])

    def rmtree(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft.shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        Run(run.folder, {"lr": 2.0}, ALONE, overwrite=True)
    with pytest.raises(ValueError, match="another lr"):
        Run(run.folder, {"lr": 2.0}, ALONE, resume=True)


def test_what_a_kill_between_the_policy_and_the_tidying_leaves_is_tidied_later(
    run, model, reader, monkeypatch
):
    run.save(1, model, [])

    def tidy(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "tidy", tidy)
    with pytest.raises(KeyboardInterrupt):
        run.finish(model, reader)
    monkeypatch.undo()
    (run.folder / ".checkpoint-000002.tmp").mkdir()
    assert Run(run.folder, {"lr": 1.0}, ALONE).finished
    assert names_in(run.folder) == ["config.json", "policy"]


def test_only_rank_0_writes(tmp_path):
    class SecondRank(Ranks):
        def wait(self):
            pass

    run = Run(tmp_path / "r", {}, SecondRank(1, 2, torch.device("cpu")))
    run.log("metrics", {"step": 1})
    assert not (tmp_path / "r").exists()


# ---- Settings, and the whole stage ---------------------------------------------------------------


def test_fsdp_without_ranks_is_refused():
    with pytest.raises(ValueError, match="--fsdp shards over several ranks: start them with"):
        Ranks.start("cpu", fsdp=True)


def test_an_unusable_device_is_one_sentence():
    with pytest.raises(ValueError, match="--device banana cannot be used here"):
        Ranks.start("banana")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"batch": -3}, "--batch must be at least 1, not -3"),
        ({"lr": float("nan")}, "--lr must be at least 0.*nan"),
        ({"lengths": [4, 0]}, "--lengths must be at least 1, not 0"),
        ({"unguided": -0.1}, "--unguided must be at least 0, not -0.1"),
        ({"unguided": 1.0}, "--unguided 1.0 leaves no answer with a prefix: use --source none"),
        ({"source": "none", "unguided": 0.5}, "--source none has no prefixes: leave out"),
        ({"source": "none", "lengths": [1]}, "--source none has no prefixes: leave out"),
        ({"source": "posterior", "vae": None}, "--vae is needed for prefixes from 'posterior'"),
        ({"tokens_per_batch": 0}, "--tokens-per-batch must be at least 1, not 0"),
        ({"save_every": 0}, "--save-every must be at least 1, not 0"),
        ({"precision": "fp8"}, "--precision must be one of fp32, bf16, not 'fp8'"),
        ({"traces": None}, "--traces is needed"),
        ({"vae": None}, "--vae is needed for prefixes from 'prior'"),
        ({"out": None}, "--out is needed"),
    ],
)
def test_bad_settings_end_with_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_settings_that_a_world_fills_in():
    config = SFTConfig()
    assert (config.vae, config.out) == ("runs/tiny/vae", "runs/tiny/sft")
    assert (config.traces, config.limit) == (["runs/tiny/base/traces.jsonl"], 10**9)
    assert (config.source, config.steps, config.batch, config.lr) == ("posterior", 100, 64, 2e-4)
    assert default_lengths(config, config.model, None) == [4, 8]
    gpt = SimpleNamespace(rows_per_z=8)
    assert default_lengths(config, config.model, gpt) == [8]  # its rows are parts of a whole
    for source in ("none", "prior"):
        baseline = SFTConfig(source=source)
        assert baseline.out == f"runs/tiny/sft-{source}"
        assert (baseline.steps, baseline.lr) == (10, 3e-6)
    real = settings(lr=None, steps=None)
    assert (real.source, real.steps, real.lr, real.limit) == ("prior", 10, 1e-5, 2000)
    posterior = settings(lr=None, steps=None, source="posterior")
    assert (posterior.steps, posterior.lr) == (100, 3e-5)
    assert settings(vae=None, source="noise").vae is None


def test_settings_that_change_no_result_are_not_kept():
    kept = result_settings(settings())
    assert kept == result_settings(
        settings(
            out="elsewhere",
            device="cuda",
            fsdp=True,
            checkpointing=True,
            tokens_per_batch=9,
            save_every=9,
            resume=True,
            overwrite=True,
        )
    )
    assert kept != result_settings(settings(precision="bf16"))


def test_a_world_s_base_and_vae_are_made_once_by_rank_0(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(sft, "find_model", made.append)
    monkeypatch.setattr(sft.vae_file, "train", made.append)

    class SecondRank(Ranks):
        def wait(self):
            pass

    for ranks in (ALONE, SecondRank(1, 2, torch.device("cpu"))):
        config = sft.make_missing(SFTConfig(), ranks)
        assert config.model == "runs/tiny/base"  # as grpo.py names it, too
        assert config.out == "runs/tiny/sft"
    world, vae_config = made
    assert world == "tiny"
    assert vae_config.model == "runs/tiny/base"
    assert vae_config.traces == ["runs/tiny/base/traces.jsonl"]
    assert (vae_config.limit, vae_config.out) == (10**9, "runs/tiny/vae")

    made.clear()
    sft.make_missing(SFTConfig(source="none"), ALONE)
    assert made == ["tiny"]  # without prefixes there is no need of a VAE


def test_a_domain_of_the_vae_that_is_there_may_be_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "find_model", str)
    config = SFTConfig(source="poetry")
    with pytest.raises(ValueError, match="unknown prefix source 'poetry'"):
        sft.make_missing(config, ALONE)
    folder = tmp_path / "runs" / "tiny" / "vae"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")  # made by vae.py from traces of one's own
    assert sft.make_missing(config, ALONE).source == "poetry"


TRACE = '{"question": "calc 1 + 1 ?", "answer": "so 2", "domain": "math"}\n'


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--source poetry", "unknown prefix source 'poetry'"),
        ("--traces x.jsonl", "no such file: x.jsonl"),
        ("--traces torn.jsonl", "torn.jsonl, line 1: not JSON"),
        ("--source none --max-tokens 3 --model POLICY", "over --max-tokens 3: raise it"),
        ("--source poetry --model POLICY --vae VAE", "unknown prefix source 'poetry'"),
        ("--model POLICY --vae nowhere", "no VAE in nowhere"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_made(
    tmp_path, monkeypatch, policy_folder, vae, flags, message
):
    vae.save(tmp_path / "vae")
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "traces.jsonl").write_text(TRACE)
    (folder / "torn.jsonl").write_text('{"question": "calc')
    monkeypatch.chdir(folder)
    if "--model" in flags:
        flags += " --traces traces.jsonl --out run"
    flags = flags.replace("POLICY", str(policy_folder)).replace("VAE", str(tmp_path / "vae"))
    with pytest.raises(ValueError, match=message):
        sft.main([*flags.split(), "--device", "cpu"])
    assert names_in(folder) == ["torn.jsonl", "traces.jsonl"]


def test_an_unknown_source_is_refused_before_the_model_is_loaded(tmp_path, vae, monkeypatch):
    vae.save(tmp_path / "vae")
    (tmp_path / "traces.jsonl").write_text(TRACE)
    monkeypatch.chdir(tmp_path)
    config = settings(source="poetry", vae="vae", traces=["traces.jsonl"], device="cpu")
    with pytest.raises(ValueError, match="unknown prefix source 'poetry'"):
        sft.train(config)  # its model "m" is nowhere


def test_the_whole_stage_from_the_posterior_says_what_prefixes_do_before_and_after(
    tmp_path, policy_folder, vae, traces, capsys
):
    vae.save(tmp_path / "vae")
    lines = [json.dumps(trace) + "\n" for trace in traces]
    (tmp_path / "traces.jsonl").write_text("".join(lines))
    changes = {"model": str(policy_folder), "vae": str(tmp_path / "vae"), "source": "posterior"}
    changes["traces"] = [str(tmp_path / "traces.jsonl")]
    run = sft.train(settings(**changes, out=str(tmp_path / "run"), device="cpu", steps=2))
    kept = json.loads((run.folder / "config.json").read_text())
    assert (kept["source"], kept["lengths"], kept["unguided"]) == ("posterior", [1, 2, 4, 8], 0.0)
    output = capsys.readouterr().out
    assert "before the warm-up: prefixes " in output
    assert "after the warm-up: prefixes " in output


def test_the_whole_stage_trains_once_and_keeps_what_it_is_made_of(
    tmp_path, policy_folder, vae, capsys
):
    vae.save(tmp_path / "vae")
    traces = tmp_path / "traces.jsonl"
    traces.write_text(TRACE * 4)
    changes = {"model": str(policy_folder), "vae": str(tmp_path / "vae"), "traces": [str(traces)]}
    config = settings(**changes, out=str(tmp_path / "run"), device="cpu", steps=2)
    run = sft.train(config)
    assert len(metrics_of(run.folder)) == 2
    kept = json.loads((run.folder / "config.json").read_text())
    assert (kept["source"], kept["lengths"], kept["lr"]) == ("prior", [1], 1e-3)

    weights = (run.folder / "policy" / "model.safetensors").read_bytes()
    before = (policy_folder / "model.safetensors").read_bytes()
    assert weights != before
    sft.train(config)  # finished: left as it is
    assert len(metrics_of(run.folder)) == 2
    with pytest.raises(ValueError, match="with another steps"):
        sft.train(settings(**changes, out=str(tmp_path / "run"), device="cpu", steps=3))
