"""grpo.py: the formulas by hand, the invariants of the update, exact resume, one rank against two."""
import copy
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import sft
import vae as vae_script
from grpo import (ALGORITHMS, Rollout, advantages, collect, guided_count, policy_loss, remember, rho_at, set_advantages,
                  set_weights, train, update)
from prefix import Decoder, Palette, load_policy
from rewards import Task, tiny_task
from sft import Ranks, Run, make_optimizer, rows_of_step
from vae import as_flags

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parent.parent


# ---- formulas -----------------------------------------------------------------------------------------------------------

def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    # mean 1/4, sample variance ((3/4)^2 + 3 (1/4)^2) / 3 = 1/4, so std 1/2
    by_std = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.0] * 4])
    torch.testing.assert_close(advantages(rewards, "mean-std"), by_std, atol=1e-3, rtol=0)
    torch.testing.assert_close(advantages(rewards, "leave-one-out"), torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0] * 4]))
    torch.testing.assert_close(advantages(rewards, "mean"), torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4]))


def test_schedules():
    taus = (0.0, 0.25, 0.49, 0.5, 0.75)
    expected = {"none": (0, 0, 0, 0, 0), "constant": (1, 1, 1, 1, 1), "two-phase": (1, 1, 1, 0, 0),
                "linear": (1, 0.75, 0.51, 0.5, 0.25), "0:0.3": (0.3,) * 5,
                "0.25:0,0.75:1": (0, 0, 0.48, 0.5, 1), "0:0,0.5:0.5,0.5:1,1:0": (0, 0.25, 0.49, 1, 0.5)}
    for name, values in expected.items():
        assert [rho_at(name, tau) for tau in taus] == pytest.approx(values), name


@pytest.mark.parametrize("rho, group", [(0.0, 8), (1.0, 8), (0.5, 8), (0.3, 8), (0.0625, 8), (1 / 3, 3), (0.9, 7)])
def test_the_share_of_guided_rollouts_is_right_on_average(rho, group):
    counts = [guided_count(rho, group, (i + 0.5) / 1000) for i in range(1000)]
    assert sum(counts) / 1000 == pytest.approx(rho * group, abs=2e-3)
    assert max(counts) - min(counts) <= 1 and max(counts) <= group


def loss_of(ratio, advantage, **options):
    """(loss, its gradient by the log-prob, clipped or not) of a single token."""
    logprobs, old = torch.tensor([math.log(ratio)], requires_grad=True), torch.zeros(1)
    loss, statistics = policy_loss(logprobs, old, old, torch.tensor([0]), torch.tensor([advantage]), torch.ones(1), **options)
    loss.backward()
    return loss.item(), logprobs.grad.item(), bool(statistics[0, 1])


def test_the_clipped_surrogate_by_hand():
    assert loss_of(1.0, 2.0)[:2] == pytest.approx((-2.0, -2.0))
    assert loss_of(1.5, 2.0)[:2] == pytest.approx((-2.4, 0.0))              # gain clipped at 1.2
    assert loss_of(1.5, -2.0)[:2] == pytest.approx((3.0, 3.0))              # a loss is not clipped away
    assert loss_of(0.5, 2.0)[:2] == pytest.approx((-1.0, -1.0))
    assert loss_of(0.5, -2.0)[:2] == pytest.approx((1.6, 0.0))
    assert loss_of(1.25, 2.0, clip_high=0.28)[:2] == pytest.approx((-2.5, -2.5))
    assert [loss_of(1.5, a)[2] for a in (2.0, -2.0)] == [True, False]


def test_the_k3_kl_by_hand():
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    old = logprobs.detach()
    loss, statistics = policy_loss(logprobs, old, old, torch.tensor([0]), torch.zeros(1), torch.ones(1),
                                   reference=torch.tensor([math.log(0.25)]), kl=0.1)
    assert statistics[0, 4].item() == pytest.approx(0.5 - math.log(0.5) - 1)    # x = 1/2: x - log x - 1
    assert loss.item() == pytest.approx(0.1 * statistics[0, 4].item())
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(0.1 * (1 - 0.5))           # d/dlogp (e^g - g - 1) = 1 - e^g


def test_truncated_importance_weights_by_hand():
    """Tokens that pi_old draws 3, 1 and 1/2 times as often as the sampler, cap 2: weights 2, 1, 1/2, which are constants."""
    row, advantage, weight = torch.tensor([0, 0, 1]), torch.tensor([1.0, -2.0]), torch.ones(2)
    logprobs = torch.zeros(3, requires_grad=True)
    old, sampled = torch.zeros(3), -torch.tensor([3.0, 1.0, 0.5]).log()
    loss, statistics = policy_loss(logprobs, old, sampled, row, advantage, weight, tis=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(-2 - 1 + 2 * 0.5) and logprobs.grad.tolist() == pytest.approx([-2.0, -1.0, 1.0])
    assert statistics[:, 3].tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert statistics[:, 2].tolist() == pytest.approx([math.log(3), 0, math.log(2)])
    off, _ = policy_loss(logprobs, old, sampled, row, advantage, weight)
    same, _ = policy_loss(logprobs, old, old, row, advantage, weight, tis=2.0)
    assert off.item() == same.item() == 0.0                                 # -1 - 1 + 2


def fake_rollouts(lengths, values, prompt=0):
    return [Rollout(prompt, [5, 6], [7] * n, [-1.0] * n, "stop", None, None, "", {"accuracy": value}, value)
            for n, value in zip(lengths, values)]


A = 0.5 / (0.5 ** 0.5 + 1e-4)               # (1, 0): mean 1/2, sample standard deviation sqrt(1/2)
BY_HAND = {                             # a token of ratio 3/2 with reward 1; three of ratios 1/2, 1, 2 with reward 0; limit 10
    "grpo": -(1.2 * A / 1 + (-0.8 - 1 - 2) * A / 3) / 2,                    # each completion's mean, then the mean of the two
    "rloo": -(1.2 - 0.8 - 1 - 2) * 1 / 20,                                  # each is the other's baseline: advantages 1 and -1
    "dr-grpo": -(1.2 - 0.8 - 1 - 2) * 0.5 / 20,                             # advantages 1/2 and -1/2
    "dapo": -(1.28 - 0.8 - 1 - 2) * A / 4,                                  # four tokens, clipped at 1.28
    "gspo": -(1.0004 - 1) * A / 2}                                          # the geometric mean of 1/2, 1, 2 is 1; 3/2 is clipped


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_by_hand(algorithm):
    args = grpo.parse_args(["--algorithm", algorithm, "--group", "2", "--max-new-tokens", "10"])
    rollouts = fake_rollouts([1, 3], [1.0, 0.0])
    set_advantages(rollouts, args)
    set_weights(rollouts, args, ALONE)
    logprobs, old = torch.tensor([1.5, 0.5, 1.0, 2.0]).log(), torch.zeros(4)
    loss, _ = policy_loss(logprobs, old, old, torch.tensor([0, 1, 1, 1]), torch.tensor([r.advantage for r in rollouts]),
                          torch.tensor([r.weight for r in rollouts]), args.ratio, args.clip_low, args.clip_high)
    assert loss.item() == pytest.approx(BY_HAND[algorithm], rel=1e-4, abs=1e-7)


def test_an_algorithm_sets_defaults_which_flags_override():
    dapo = grpo.parse_args(["--algorithm", "dapo", "--clip-high", "0.3"])
    assert (dapo.clip_low, dapo.clip_high, dapo.mean_over, dapo.resample, dapo.advantage) == (0.2, 0.3, "token", 2, "mean-std")
    assert grpo.parse_args(["--algorithm", "gspo", "--ratio", "token"]).ratio == "token"
    assert vars(grpo.parse_args([])) == vars(grpo.parse_args(["--algorithm", "grpo", "--model", "tiny"]))
    real = grpo.parse_args(["--model", "some/model", "--traces", "t.jsonl", "--steps", "7"])
    assert (real.lr, real.steps, real.schedule, real.out) == (1e-6, 7, ["two-phase"], "runs/real")


def weights_of(rollouts, mean_over, truncated="keep"):
    rollouts = copy.deepcopy(rollouts)
    set_weights(rollouts, SimpleNamespace(mean_over=mean_over, truncated=truncated, max_new_tokens=10), ALONE)
    return [r.weight for r in rollouts]


def test_token_weights_by_hand():
    rollouts = fake_rollouts([2, 3, 5], [1, 0, 0])
    assert weights_of(rollouts, "token") == pytest.approx([0.1] * 3)
    assert weights_of(rollouts, "sequence") == pytest.approx([1 / 6, 1 / 9, 1 / 15])
    assert weights_of(rollouts, "constant") == pytest.approx([1 / 30] * 3)


def test_a_masked_completion_is_in_neither_numerator_nor_denominator():
    rollouts = fake_rollouts([2, 3, 5], [1, 0, 0])
    rollouts[2].finish = "length"
    assert weights_of(rollouts, "token", "mask") == pytest.approx([1 / 5, 1 / 5, 0])
    assert weights_of(rollouts, "sequence", "mask") == pytest.approx([1 / 4, 1 / 6, 0])
    assert weights_of(rollouts, "constant", "mask") == pytest.approx([1 / 20, 1 / 20, 0])
    assert weights_of(rollouts, "token", "penalise") == weights_of(rollouts, "token") == pytest.approx([0.1] * 3)
    for r in rollouts:
        r.finish = "length"
    assert weights_of(rollouts, "token", "mask") == [0, 0, 0]               # nothing left: no division by zero


def test_groups_without_signal_are_exactly_zero():
    rollouts = fake_rollouts([1] * 6, [0.9, 0.9, 0.9, 0, 1, 0])            # the float mean of three 0.9 is not 0.9
    set_advantages(rollouts, SimpleNamespace(group=3, advantage="mean-std"))
    assert [r.advantage for r in rollouts[:3]] == [0.0] * 3 and rollouts[4].advantage > 0 > rollouts[3].advantage


def test_an_epoch_shows_every_row_once_and_the_next_one_in_another_order():
    task = Task("t", train=[{"question": str(i), "answer": "1"} for i in range(10)], test=[])
    shown = [row["question"] for step in range(4) for row in rows_of_step(task.train, step, 5, seed=3)]
    assert sorted(shown[:10]) == sorted(shown[10:]) == sorted(str(i) for i in range(10)) and shown[:10] != shown[10:]
    assert shown[5:10] == [row["question"] for row in rows_of_step(task.train, 1, 5, seed=3)]          # no state between calls
    assert len(rows_of_step(task.train, 0, 25, seed=3)) == 25                                           # more than an epoch


def test_replacements_are_the_other_questions_and_leave_the_epoch_as_it_is():
    task = Task("t", train=[{"question": str(i), "answer": "1"} for i in range(12)], test=[])
    rows = [[row["question"] for row in rows_of_step(task.train, step, 4, seed=3, extra=2)] for step in (0, 1)]
    assert all(sorted(shown, key=int) == [str(i) for i in range(12)] for shown in rows)           # 4 + 2 x 4, none twice
    assert rows[0][4:] != rows[1][4:] and rows[0][:4] == [row["question"] for row in rows_of_step(task.train, 0, 4, seed=3)]
    assert len(rows_of_step(task.train, 0, 12, seed=3, extra=1)) == 24                                  # no other left: asked again


# ---- the update ---------------------------------------------------------------------------------------------------------

def arguments(**changes):
    """What parse_args gives for the tiny world, small."""
    args = grpo.parse_args(["--steps", "4", "--prompts", "4", "--group", "4", "--length", "3", "--max-new-tokens", "12",
                            "--eval-questions", "8", "--eval-every", "2", "--save-every", "1"])
    args.schedule, args.seed = "linear", 0
    if "algorithm" in changes:
        changes = {**dict(zip(grpo.PRESETS, ALGORITHMS[changes["algorithm"]])), **changes}
    for name, value in changes.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


class FirstToken(Task):
    """Right if the completion starts with an even token: an untrained model is right about half of the time."""

    def judge(self, completion, gold, finish="stop"):
        words = completion.split()
        return {"accuracy": float(bool(words) and len(words[0]) % 2 == 0), "answered": 1.0}


@pytest.fixture
def task():
    tiny = tiny_task(32, 8)
    return FirstToken("first", tiny.train, tiny.test)


def rollouts_of(model, tokenizer, vae, task, args, ranks=ALONE, source="prior"):
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), source, args.length, not args.independent)
    return collect(Decoder(model, slots=5), tokenizer, task, palette, 1, args, ranks)


def gradient_of(model, rollouts, args, reference=None, ranks=ALONE):
    """The gradient that update() would apply, with everything that follows it left out; and its metrics, summed over parts."""
    found = {}

    def grab(model, *_):
        found.update({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
        return 0.0

    for r in rollouts:
        r.old = None                                                        # as if newly sampled: with --tis, pi_old is pi
    if args.kl:
        remember("reference", reference, rollouts, args, ranks)
    original, grpo.apply_gradients = grpo.apply_gradients, grab
    try:
        sums = update(model, make_optimizer(model, 1e-3), rollouts, args, ranks)["sums"]
    finally:
        grpo.apply_gradients = original
    return found, dict(zip(grpo.TOKEN_METRICS, sums.sum(0).tolist()))


def assert_same_gradients(one, other, atol=1e-6, scale=1.0):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(scale * one[name], other[name], atol=atol, rtol=1e-3, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_update_is_on_policy_and_its_gradient_is_the_formula(model, tokenizer, vae, task, algorithm):
    """Prefixes on some rows, end tokens, uneven lengths, temperature 0.7: log-ratio 0, gradient = -A grad log p / normaliser.

    On policy a clip changes nothing, and the gradient of a completion's geometric mean ratio is that of its mean log-prob.
    """
    args = arguments(algorithm=algorithm, temperature=0.7, resample=0, truncated="mask")
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    assert {r.guided for r in rollouts} == {True, False} and {r.finish for r in rollouts} == {"length", "stop"}
    ours, sums = gradient_of(model, rollouts, args)
    assert sums["log_ratio"] / sums["tokens"] < 1e-5
    kept = [r for r in rollouts if r.finish == "stop"]
    tokens, embed, total = sum(len(r.completion_ids) for r in kept), model.get_input_embeddings(), 0.0
    for r in kept:
        lead = r.prefix if r.guided else torch.zeros(0, 128)
        inputs = torch.cat([lead, embed(torch.tensor(r.prompt_ids + r.completion_ids))])[None]
        logprobs = (model(inputs_embeds=inputs).logits[0, -len(r.completion_ids) - 1:-1] / 0.7).log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(r.completion_ids)[:, None]).sum()
        total = total - r.advantage * picked / {"token": tokens, "sequence": len(r.completion_ids) * len(kept),
                                                "constant": len(kept) * 12}[args.mean_over]
    total.backward()
    assert_same_gradients(ours, {name: p.grad for name, p in model.named_parameters()}, atol=2e-6)


def test_two_pairs_of_algorithms_agree_on_policy(model, tokenizer, vae, task):
    rollouts, found = rollouts_of(model, tokenizer, vae, task, arguments()), {}
    for name in ("grpo", "gspo", "rloo", "dr-grpo"):
        args = arguments(algorithm=name)
        set_advantages(rollouts, args)
        found[name] = gradient_of(model, rollouts, args)[0]
    assert_same_gradients(found["grpo"], found["gspo"])
    assert_same_gradients(found["rloo"], found["dr-grpo"], scale=3 / 4)


OPTIONS = [*(dict(algorithm=name) for name in ALGORITHMS),
           dict(truncated="mask"), dict(truncated="penalise", tis=1.5), dict(kl=0.2)]


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_the_gradient_does_not_depend_on_micro_batches_or_ranks(model, tokenizer, vae, task, changes):
    """Off policy, so that ratios differ from 1 and some are clipped; with uneven lengths and a group without signal."""
    args = arguments(**{"resample": 0, **changes})
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    for r in rollouts[:4]:
        r.advantage = 0.0
    rng, reference = random.Random(0), copy.deepcopy(model) if args.kl else None
    for i, r in enumerate(rollouts):
        r.completion_ids, r.finish = r.completion_ids[:1 + i % 7], "length" if i % 3 == 0 else "stop"
        r.logprobs = [x + rng.gauss(0, 0.3) for x in r.logprobs[:1 + i % 7]]
    longest = max(r.length for r in rollouts)
    found = [gradient_of(model, rollouts, SimpleNamespace(**{**vars(args), "tokens_per_batch": rows * longest}), reference)
             for rows in (1, 3, 8, 100)]
    for other, sums in found[1:]:
        assert_same_gradients(found[0][0], other)
        assert sums == pytest.approx(found[0][1], rel=1e-5)
    assert any(value.abs().max() > 1e-5 for value in found[0][0].values()) and (args.tis or found[0][1]["clip_share"] > 0)

    kept = [r for r in rollouts if r.weight or args.truncated != "mask"]    # what two ranks would agree on in Ranks.total

    class Half(Ranks):
        def total(self, values):
            return [sum(len(r.completion_ids) for r in kept), len(kept)]

    halves = [gradient_of(model, [r for r in rollouts if r.prompt % 2 == rank], args, reference, Half(rank, 2, ALONE.device))
              for rank in (0, 1)]
    assert_same_gradients(found[0][0], {name: halves[0][0][name] + halves[1][0][name] for name in halves[0][0]})


def test_an_end_token_is_trained(model, tokenizer):
    """Bug 1 of design.md: a completion that is nothing but its end token becomes likelier."""
    args, end = arguments(), tokenizer.eos_token_id
    rollout = Rollout(0, [5, 6], [end], [0.0], "stop", None, None, "", {}, 1.0, advantage=1.0)
    likely = lambda: model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1)[end].item()
    rollout.logprobs, optimizer = [likely()], make_optimizer(model, 1e-3)
    before = likely()
    update(model, optimizer, [rollout], args, ALONE)
    assert likely() > before + 0.01


def test_truncated_completions_are_penalised_or_kept(model, tokenizer, vae, task):
    kept, penalised, masked = (rollouts_of(model, tokenizer, vae, task, arguments(truncated=how))
                               for how in ("keep", "penalise", "mask"))
    assert 0 < sum(r.finish == "length" for r in kept) < len(kept)
    for one, two, three in zip(kept, penalised, masked):
        assert one.completion_ids == two.completion_ids == three.completion_ids and one.rewards == two.rewards
        assert two.reward == one.reward - (one.finish == "length") and three.reward == one.reward
        assert three.advantage == one.advantage                             # masked ones stay in their group's baseline


def test_importance_weights_scale_the_gradient_and_nothing_changes_without_a_gap(model, tokenizer, vae, task):
    args = arguments()
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    off = gradient_of(model, rollouts, args)[0]
    assert_same_gradients(off, gradient_of(model, rollouts, arguments(tis=2.0))[0])         # sampler and training agree
    for r in rollouts:
        r.logprobs = [x - math.log(1.5) for x in r.logprobs]                # a sampler that drew each token too rarely
    doubled, sums = gradient_of(model, rollouts, arguments(tis=2.0))
    assert_same_gradients(off, doubled, scale=1.5)
    assert sums["clip_share"] == 0 and sums["tis_weight"] / sums["tokens"] == pytest.approx(1.5, abs=1e-4)
    assert sums["log_ratio"] / sums["tokens"] == pytest.approx(math.log(1.5), abs=1e-4)
    assert_same_gradients(off, gradient_of(model, rollouts, arguments(tis=1.2))[0], scale=1.2)
    assert gradient_of(model, rollouts, args)[1]["clip_share"] > 0          # without them the gap is taken for an update


def test_rollouts_in_bfloat16_are_corrected_by_tis(model, tokenizer, vae, task):
    """The metrics show the gap between sampler and policy; with --tis it moves no token out of the clip range."""
    args = arguments(tis=2.0, clip_low=1e-3, clip_high=1e-3)
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", args.length)
    decoder = Decoder(model, slots=5, dtype=grpo.PRECISIONS["bf16"])
    rollouts = collect(decoder, tokenizer, task, palette, 1, args, ALONE)
    sums = gradient_of(model, rollouts, args)[1]
    assert 1e-4 < sums["log_ratio"] / sums["tokens"] < 0.2 and sums["tis_weight"] != sums["tokens"] and sums["clip_share"] == 0
    args.tis = 0.0
    assert gradient_of(model, rollouts, args)[1]["clip_share"] > 0


def test_pi_old_stays_what_it_was_at_the_first_epoch(model, tokenizer, vae, task):
    args = arguments(tis=2.0, epochs=3)
    rollouts = [r for r in rollouts_of(model, tokenizer, vae, task, args) if r.advantage]
    optimizer = make_optimizer(model, 3e-3)
    remember("old", model, rollouts, args, ALONE)
    old = [x for r in rollouts for x in r.old]
    torch.testing.assert_close(torch.tensor(old), torch.tensor([x for r in rollouts for x in r.logprobs]), atol=1e-5, rtol=0)
    clipped = [update(model, optimizer, rollouts, args, ALONE)["sums"].sum(0)[1] for _ in range(3)]
    assert clipped[0] == 0 < clipped[2] and [x for r in rollouts for x in r.old] == old     # the ratio left the clip range


class SomePrompts(Task):
    """No completion of a question about lists is right; of the others about half are."""

    def judge(self, completion, gold, finish="stop"):
        return {"accuracy": float(gold == "arith" and len(completion) % 2), "answered": 1.0}


def some_prompts():
    rows = tiny_task(40, 8).train
    return SomePrompts("some", [{**row, "answer": row["family"]} for row in rows], rows[:8])


def test_groups_without_signal_are_replaced_a_bounded_number_of_times(model, tokenizer, vae):
    task = some_prompts()
    without, once, often = (rollouts_of(model, tokenizer, vae, task, arguments(resample=rounds)) for rounds in (0, 1, 6))
    silent = lambda rollouts: sum(not any(r.advantage for r in rollouts[i:i + 4]) for i in range(0, 16, 4))
    assert silent(without) > 0 == silent(often) and silent(without) >= silent(once)
    for plain, replaced in zip(without, often):                             # a group with signal is left as it was
        assert replaced.prompt % 4 == plain.prompt
        assert replaced.prompt >= 4 or replaced.completion_ids == plain.completion_ids
    assert [r.prompt % 4 for r in often] == [p for p in range(4) for _ in range(4)] and max(r.prompt for r in often) < 4 * 7
    assert len({tuple(r.prompt_ids) for r in often}) == 4
    assert grpo.summary(without, [NOTHING_TRAINED], arguments(), ALONE)["groups_resampled"] == 0
    row = grpo.summary(often, [NOTHING_TRAINED], arguments(), ALONE)
    assert row["groups_without_signal"] == 0 and row["groups_resampled"] == sum(r.prompt // 4 for r in often[::4]) > 0
    hopeless = SomePrompts("none", [{**row, "answer": "list"} for row in task.train], task.test)
    last = rollouts_of(model, tokenizer, vae, hopeless, arguments(resample=2))
    assert [r.prompt for r in last[::4]] == [8, 9, 10, 11]                  # the last round's stay, without signal


def test_resampling_is_the_same_on_one_rank_and_on_two(model, tokenizer, vae):
    args = arguments(resample=3)
    whole = rollouts_of(model, tokenizer, vae, some_prompts(), args)
    halves = [rollouts_of(model, tokenizer, vae, some_prompts(), args, Ranks(rank, 2, ALONE.device)) for rank in (0, 1)]
    shown = lambda rollouts: {(r.prompt, tuple(r.prompt_ids), tuple(r.completion_ids), r.guided) for r in rollouts}
    assert shown(halves[0]) | shown(halves[1]) == shown(whole) and max(r.prompt for r in whole) >= 4


NOTHING_TRAINED = {"loss": 0.0, "gradient_norm": 0.0, "sums": torch.zeros(2, len(grpo.TOKEN_METRICS))}


def test_the_reward_is_the_weighted_sum_of_its_parts_and_each_is_logged(model, tokenizer, vae, task):
    args = arguments(reward={"accuracy": 1.0, "overlong": 0.5})
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    for r in rollouts:
        assert r.reward == r.rewards["accuracy"] + 0.5 * r.rewards["overlong"]
        assert r.rewards["overlong"] == (0.0 if len(r.completion_ids) <= 10 else -0.5 if len(r.completion_ids) == 11 else -1.0)
    row = grpo.summary(rollouts, [NOTHING_TRAINED], args, ALONE)
    assert row["reward"] == pytest.approx(sum(r.reward for r in rollouts) / 16)
    guided = [r for r in rollouts if r.guided]
    assert row["rollouts_guided"] == len(guided) and row["overlong_guided"] == pytest.approx(
        sum(r.rewards["overlong"] for r in guided) / len(guided))
    assert row["advantage_guided"] == pytest.approx(sum(r.advantage for r in guided) / len(guided))
    assert row["entropy"] is row["kl_guided"] is None                       # no token was trained on


def test_metrics_of_guided_and_unguided_tokens_add_up_to_the_whole(model, tokenizer, vae, task):
    args = arguments(kl=0.1)
    rollouts, other = rollouts_of(model, tokenizer, vae, task, args), copy.deepcopy(model)
    remember("reference", other, rollouts, args, ALONE)
    update(model, make_optimizer(model, 1e-2), rollouts, args, ALONE)
    row = grpo.summary(rollouts, [update(model, make_optimizer(model, 1e-2), rollouts, args, ALONE)], args, ALONE)
    guided = sum(len(r.completion_ids) for r in rollouts if r.guided)
    assert row["tokens_guided"] == guided and row["tokens_unguided"] == row["tokens"] - guided > 0
    for name in ("entropy", "kl", "clip_share", "log_ratio"):
        parts = row[name + "_guided"], row[name + "_unguided"]
        assert row[name] == pytest.approx((parts[0] * guided + parts[1] * row["tokens_unguided"]) / row["tokens"])
        assert parts[0] != parts[1] and min(parts) > 0
    alone, one = rollouts[0], arguments()
    update(other, make_optimizer(other, 0.0), rollouts, one, ALONE)   # entropy of the guided rows, computed apart
    inputs = torch.cat([alone.prefix, other.get_input_embeddings()(torch.tensor(alone.prompt_ids + alone.completion_ids))])
    logits = other(inputs_embeds=inputs[None]).logits[0, -len(alone.completion_ids) - 1:-1]
    alone.advantage = 1.0
    sums = update(other, make_optimizer(other, 0.0), [alone], one, ALONE)["sums"]
    assert sums[1, -1].item() == pytest.approx(torch.distributions.Categorical(logits=logits).entropy().sum().item(), rel=1e-4)


def test_silent_rollouts_cost_no_forward_pass(model, tokenizer, vae, task, monkeypatch):
    args = arguments()
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    for r in rollouts:
        r.advantage = 0.0
    monkeypatch.setattr(grpo, "completion_logprobs", lambda *_: 1 / 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = update(model, make_optimizer(model, 1e-3), rollouts, args, ALONE)
    assert done["gradient_norm"] == 0.0 and not done["sums"].any()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_which_rollouts_are_guided_and_who_shares_a_latent(model, tokenizer, vae, task):
    for per, distinct in (("rollout", 4), ("prompt", 1)):
        rollouts = rollouts_of(model, tokenizer, vae, task, arguments(schedule="constant", latent_per=per))
        first = [r for r in rollouts if r.prompt == 0]
        assert all(r.guided for r in rollouts) and len({tuple(r.latent.flatten().tolist()) for r in first}) == distinct
    assert not any(r.guided for r in rollouts_of(model, tokenizer, vae, task, arguments(schedule="none")))
    half = rollouts_of(model, tokenizer, vae, task, arguments(schedule="0:0.5"))
    assert [r.guided for r in half] == [True, True, False, False] * 4
    odd = rollouts_of(model, tokenizer, vae, task, arguments(schedule="0:0.375", prompts=8))
    counts = {sum(r.guided for r in odd[i:i + 4]) for i in range(0, 32, 4)}
    assert counts == {1, 2}                                 # 1.5 a group, rounded for each prompt anew


@pytest.mark.parametrize("source, independent", [("prior", False), ("prior", True), ("mixture", True), ("math", False),
                                                 ("noise", False), ("gauss", True)])
def test_prefixes_of_every_source_reach_the_rollouts(model, tokenizer, vae, task, source, independent):
    args = arguments(schedule="constant", independent=independent)
    rollouts = rollouts_of(model, tokenizer, vae, task, args, source=source)
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), source, 3, not independent)
    for i, r in enumerate(rollouts):
        prefix, latent = (found[0] for found in palette.draw([sft.seed_of(0, "latent", 1, i // 4, i % 4)]))
        assert torch.equal(r.prefix, prefix) and r.prefix.shape == (3, 128) and torch.equal(prefix[0], prefix[1]) != independent
        assert (latent is None and r.latent is None) or torch.equal(r.latent, latent)
        assert (latent is None) == (source in ("noise", "gauss"))


def test_a_kl_term_pulls_towards_the_reference(model, tokenizer, vae, task):
    args = arguments(kl=0.5)
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    optimizer = make_optimizer(model, 1e-2)
    remember("reference", copy.deepcopy(model), rollouts, args, ALONE)
    kl = lambda optimizer: update(model, optimizer, rollouts, args, ALONE)["sums"][:, 4].sum().item()
    assert kl(optimizer) == pytest.approx(0.0, abs=1e-4)                    # the policy still is the reference
    before = kl(make_optimizer(model, 1e-2))
    assert before > 1e-3
    for r in rollouts:                                                      # nothing but the KL term is left
        r.advantage = 0.0
    optimizer = make_optimizer(model, 3e-3)
    assert 0 < [kl(optimizer) for _ in range(10)][-1] < 0.5 * before        # above 0: silent rollouts are trained here


def test_the_flags_of_the_loss_reach_it_in_their_order(model, tokenizer, vae, task, monkeypatch):
    args, seen = arguments(clip_low=0.1, clip_high=0.3, tis=4.0, ratio="sequence", kl=0.5), []
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    original = grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *a: seen.append((*a[6:10], a[11])) or original(*a))
    remember("reference", model, rollouts, args, ALONE)
    update(model, make_optimizer(model, 1e-3), rollouts, args, ALONE)
    assert set(seen) == {("sequence", 0.1, 0.3, 4.0, 0.5)}


def test_filters_of_the_sampling_are_those_of_the_scoring(model, tokenizer, vae, task):
    """Bug 2 of design.md: sampled with top-p, top-k and a temperature, scored without."""
    args = arguments(temperature=0.8, top_p=0.7, top_k=20)
    sums = gradient_of(model, rollouts_of(model, tokenizer, vae, task, args), args)[1]
    assert sums["tokens"] > 50 and sums["log_ratio"] / sums["tokens"] < 1e-5
    assert sums["entropy"] / sums["tokens"] < math.log(20)


def test_every_step_samples_anew(model, tokenizer, vae, task):
    task.train[:] = task.train[:4]                                          # the same four prompts at every step
    args, decoder = arguments(schedule="constant"), Decoder(model)
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", args.length)
    steps = [collect(decoder, tokenizer, task, palette, step, args, ALONE) for step in (0, 1)]
    one, two = ({tuple(r.prompt_ids + r.completion_ids) for r in rollouts} for rollouts in steps)
    assert not one & two
    latents = [{tuple(r.latent.flatten().tolist()) for r in rollouts} for rollouts in steps]
    assert not latents[0] & latents[1]


def test_every_seed_samples_anew(model, tokenizer, vae, task):
    rows = [[row["question"] for row in rows_of_step(task.train, 0, 8, seed)] for seed in (0, 1)]
    assert sorted(rows[0]) != sorted(rows[1])
    task.train[:] = task.train[:1]                                          # both seeds ask the same question
    found = []
    for seed in (0, 1):
        half = arguments(schedule="0:0.5", prompts=1, group=16)
        half.seed = seed
        rollouts = rollouts_of(model, tokenizer, vae, task, half)
        found.append([[r.latent.tolist() for r in rollouts if r.guided], [r.completion_ids for r in rollouts if not r.guided]])
    (one, words), (other, other_words) = found
    assert not any(z in one for z in other) and sum(a == b for a, b in zip(words, other_words)) < len(words) / 2


def test_a_share_is_rounded_anew_at_every_step(model, tokenizer, vae, task):
    args, decoder = arguments(schedule="0:0.375", prompts=1, max_new_tokens=2), Decoder(model)
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", args.length)
    counts = [sum(r.guided for r in collect(decoder, tokenizer, task, palette, step, args, ALONE)) for step in range(12)]
    assert set(counts) == {1, 2}                                            # of 4 rollouts, 1.5 on average


def test_rollouts_end_at_the_stop_strings_of_their_prompt_format(model, tokenizer, vae, task, monkeypatch):
    args = arguments(prompt="few-shot")
    whole = rollouts_of(model, tokenizer, vae, task, args)
    stop = f" {whole[0].text.split()[3]} "                                  # the fourth of up to twelve words
    monkeypatch.setattr(grpo, "stop_strings", lambda _, style: [stop] if style == "few-shot" else [])
    cut = rollouts_of(model, tokenizer, vae, task, args)
    assert [r.text for r in cut] == [r.text.partition(stop)[0] for r in whole]
    assert len(cut[0].completion_ids) == 5 < len(whole[0].completion_ids) and cut[0].finish == "stop"


def test_masked_completions_cost_no_forward_pass(model, tokenizer, vae, task, monkeypatch):
    args, seen, original = arguments(truncated="mask"), [], grpo.completion_logprobs
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    monkeypatch.setattr(grpo, "completion_logprobs", lambda model, prompts, completions, *a: seen.extend(completions) or
                        original(model, prompts, completions, *a))
    update(model, make_optimizer(model, 1e-3), rollouts, args, ALONE)
    trained = [r.completion_ids for r in rollouts if r.finish == "stop" and r.advantage]
    assert sorted(seen) == sorted(trained) and len(seen) < len(rollouts)


# ---- the loop -----------------------------------------------------------------------------------------------------------

def test_pi_old_is_the_policy_of_the_rollouts_for_every_minibatch(tmp_path, policy_folder, vae, task, monkeypatch):
    """With --tis it comes from training's forward: also for those that are trained on after pi has moved."""
    gaps, original = [], grpo.update

    def watch(*a):
        found = original(*a)
        gaps.append(max(abs(x - y) for r in a[2] if r.old for x, y in zip(r.old, r.logprobs)))
        return found

    monkeypatch.setattr(grpo, "update", watch)
    _, metrics = run_training(tmp_path / "r", policy_folder, vae, task, arguments(steps=1, prompts=8, minibatches=4, tis=2.0, lr=1e-2))
    assert len(gaps) == 4 and max(gaps) < 1e-4 and metrics[1]["clip_share"] > 0


def run_training(folder, policy_folder, vae, task, args, resume=False):
    model, tokenizer = load_policy(str(policy_folder))
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", args.length)
    train(model, tokenizer, task, palette, Run(folder, {}, ALONE, resume=resume), args, copy.deepcopy(model) if args.kl else None)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return model, [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("die_at, call", [("collect", 1), ("collect", 4), ("update", 10), ("save", 3)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, policy_folder, vae, task, die_at, call, monkeypatch):
    args = arguments(epochs=2, minibatches=2)
    whole, metrics = run_training(tmp_path / "whole", policy_folder, vae, task, args)
    calls, owner = [], Run if die_at == "save" else grpo
    original = getattr(owner, die_at)

    def dying(*a, **k):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*a, **k)

    monkeypatch.setattr(owner, die_at, dying)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "torn", policy_folder, vae, task, args)
    monkeypatch.setattr(owner, die_at, original)
    resumed, resumed_metrics = run_training(tmp_path / "torn", policy_folder, vae, task, args, resume=True)
    assert resumed_metrics == metrics and [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    best = [json.loads((tmp_path / name / "best" / "best.json").read_text()) for name in ("whole", "torn")]
    assert best[0] == best[1] and best[0]["score"] == max(row.get("eval_accuracy", 0) for row in metrics)
    assert (tmp_path / "torn" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def test_the_loop_follows_the_learning_rate_schedule(tmp_path, policy_folder, vae, task, monkeypatch):
    rates, original = [], grpo.apply_gradients
    monkeypatch.setattr(grpo, "apply_gradients", lambda model, optimizers, *a: rates.append(optimizers[0].param_groups[0]["lr"]) or
                        original(model, optimizers, *a))
    run_training(tmp_path / "r", policy_folder, vae, task, arguments(steps=4, lr=1e-3, lr_schedule="linear", lr_warmup=1))
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_a_row_of_metrics_is_made_of_all_updates_micro_batches_and_rollouts(tmp_path, policy_folder, vae, task, monkeypatch):
    """One step of 2 epochs x 2 minibatches x several micro-batches, watched from outside and added up by hand."""
    args = arguments(steps=1, prompts=8, epochs=2, minibatches=2, lr=1e-2, max_new_tokens=60, tokens_per_batch=100,
                     truncated="mask", schedule="0:0.5", kl=0.1)
    seen = {name: [] for name in ("collect", "policy_loss", "apply_gradients")}
    for name, calls in seen.items():
        monkeypatch.setattr(grpo, name, lambda *a, name=name, calls=calls, original=getattr(grpo, name):
                            calls.append(original(*a)) or calls[-1])
    updates = []                                            # how many micro-batches came before each update ended
    original = grpo.update
    monkeypatch.setattr(grpo, "update", lambda *a: (original(*a), updates.append(len(seen["policy_loss"])))[0])
    _, (_, row) = run_training(tmp_path / "r", policy_folder, vae, task, args)
    rollouts, losses = seen["collect"][0], [loss.item() for loss, _ in seen["policy_loss"]]
    tokens = [torch.cat([statistics for _, statistics in seen["policy_loss"][a:b]]) for a, b in zip([0, *updates], updates)]
    assert len(updates) == 4 and len(losses) > 8
    assert row["loss"] == pytest.approx(sum(losses) / 4, abs=1e-7) and row["tokens"] == sum(map(len, tokens))
    assert row["gradient_norm"] == pytest.approx(sum(seen["apply_gradients"]) / 4)
    for i, name in enumerate(("clip_share", "log_ratio", "tis_weight", "kl"), 1):
        assert row[name] == pytest.approx(torch.cat(tokens)[:, i].mean().item(), rel=1e-4), name
    assert row["log_ratio_start"] == pytest.approx(tokens[0][:, 2].mean().item(), abs=1e-8) and row["log_ratio"] > 1e-3
    kept = [r for r in rollouts if r.finish == "stop"]
    assert row["tokens"] == 2 * sum(len(r.completion_ids) for r in kept) and 0 < len(kept) < 32
    for part, rows in (("", rollouts), ("_guided", [r for r in rollouts if r.guided]),
                       ("_unguided", [r for r in rollouts if not r.guided])):
        expected = {"stopped": [r.finish == "stop" for r in rows], "length": [len(r.completion_ids) for r in rows],
                    "reward": [r.reward for r in rows], "accuracy": [r.rewards["accuracy"] for r in rows]}
        for name, values in expected.items():
            assert row[name + part] == pytest.approx(sum(values) / len(values)), name + part
    glossary = (ROOT / "README.md").read_text().split("## What the metrics mean")[1].split("\n## ")[0]
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    logged = {name.removesuffix("_unguided").removesuffix("_guided") for line in lines for name in json.loads(line)}
    assert all(f"`{name}`" in glossary for name in logged), [name for name in logged if f"`{name}`" not in glossary]
    samples = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    shown = [r for i in (0, 3) for r in rollouts[i::4]]     # each group's first, then each group's last
    assert [s["completion"] for s in samples] == [r.text for r in shown] and [s["prompt"] for s in samples] == [*range(8)] * 2
    assert [s["latent"] is not None for s in samples] == [True] * 8 + [False] * 8 == [r.guided for r in shown]


def test_evaluations_come_at_the_start_on_the_way_and_at_the_end_and_the_best_is_kept(tmp_path, policy_folder, vae, task,
                                                                                       monkeypatch):
    for scores, best in (((0.1, 0.4, 0.2, 0.3), 2), ((0.5, 0.4, 0.5, 0.3), 0), ((0.1, 0.2, 0.3, 0.4), 5)):
        left = list(scores)
        monkeypatch.setattr(grpo.evaluate, "greedy_accuracy", lambda *_: left.pop(0))
        folder = tmp_path / str(best)
        _, metrics = run_training(folder, policy_folder, vae, task, arguments(steps=5, eval_every=2))
        assert {row["step"]: row["eval_accuracy"] for row in metrics if "eval_accuracy" in row} == dict(zip((0, 2, 4, 5), scores))
        assert json.loads((folder / "best" / "best.json").read_text()) == {"step": best, "score": max(scores)}


def test_the_loop_samples_in_the_precision_asked_for(tmp_path, policy_folder, vae, task):
    gaps = [run_training(tmp_path / name, policy_folder, vae, task, arguments(steps=1, rollout_precision=name))[1][1]["log_ratio_start"]
            for name in ("fp32", "bf16")]
    assert gaps[0] < 1e-5 < 1e-4 < gaps[1]


def test_the_loop_learns_a_rewarded_first_token(tmp_path, policy_folder, vae, task):
    args = arguments(steps=20, prompts=8, lr=3e-3, eval_every=20, save_every=100)
    _, metrics = run_training(tmp_path / "r", policy_folder, vae, task, args)
    assert metrics[1]["reward"] < 0.8 and metrics[-1]["reward"] > 0.95
    assert metrics[1]["log_ratio_start"] < 1e-5
    assert metrics[1]["reward_guided"] is not None and metrics[1]["rollouts_guided"] == 8 * 4
    sample, *others = map(json.loads, (tmp_path / "r" / "samples.jsonl").read_text().splitlines())
    assert len(others) + 1 == 20 * 2 * 8                                    # each group's first and last
    assert sample["prefix"] == "prior" and len(sample["latent"][0]) == 8 and "completion" in sample


RANK_SCRIPT = """
import sys
import torch
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import test_grpo as t
from rewards import tiny_task
from vae import VAE
tiny = tiny_task(32, 8)
model, tokenizer = t.load_policy({policy!r})
palette = t.Palette(VAE.load({vae!r}), model.get_input_embeddings().weight.detach(), "prior", 3)
ranks = t.Ranks.start("cpu")
args = t.arguments(**{changes!r})
t.train(model, tokenizer, t.FirstToken("first", tiny.train, tiny.test), palette, t.Run(Path({out!r}), {{}}, ranks), args)
"""


def test_two_ranks_train_like_one(tmp_path, policy_folder, vae):
    vae.save(tmp_path / "vae")
    metrics = []
    for world in (1, 2):
        script = tmp_path / f"ranks{world}.py"
        script.write_text(RANK_SCRIPT.format(
            root=str(ROOT), tests=str(ROOT / "tests"), policy=str(policy_folder), vae=str(tmp_path / "vae"),
            out=str(tmp_path / f"out{world}"),
            changes=dict(steps=5, algorithm="dapo", tis=1.5, truncated="mask", epochs=2, minibatches=2)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=0",
                               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script)],
                              env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics.append([json.loads(line) for line in (tmp_path / f"out{world}" / "metrics.jsonl").read_text().splitlines()])
    assert len(metrics[0]) == len(metrics[1]) == 6 and sum(row.get("groups_resampled", 0) for row in metrics[0]) > 0
    for one, two in zip(*metrics):
        for name, value in one.items():
            if not name.startswith("seconds"):
                assert two[name] == pytest.approx(value, abs=1e-5), (one["step"], name)


def test_a_stage_of_other_settings_is_refused_with_the_command_that_replaces_it(tmp_path, policy_folder):
    folder = tmp_path / "sft"
    folder.mkdir()
    flags = dict(model=policy_folder, prefix="noise", out=folder, traces=[tmp_path / "traces.jsonl"])
    (tmp_path / "traces.jsonl").write_text('{"question": "calc 1 ?", "answer": "so 1", "domain": "math"}\n')
    (folder / "config.json").write_text('{"lr": 1}')
    with pytest.raises(ValueError, match=r"another lr.*or replace it: python sft.py \.\.\. --overwrite"):
        sft.stage("sft.py", sft.main, flags, ALONE)
    with pytest.raises(ValueError, match=r"or replace it: python sft.py pretrain \.\.\. --overwrite"):
        sft.stage("sft.py pretrain", sft.main, dict(out=folder, resume=True), ALONE)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"sft/config.json is damaged"):
        sft.stage("sft.py", sft.main, flags, ALONE)


def test_the_stages_are_those_that_the_scripts_alone_would_make(monkeypatch):
    """So `python vae.py` or `python sft.py` after `python grpo.py` (or before) use one another's results."""
    built = {}
    monkeypatch.setattr(sft, "stage", lambda script, main, flags, __: main and built.setdefault(script.split()[0], []).append(
        [*script.split()[1:], *as_flags(**flags)]))
    policies = sft.prepare(grpo.parse_args([]), ALONE)
    assert sft.prepare(grpo.parse_args([]), Ranks(1, 2, ALONE.device)) == policies and len(built["vae.py"]) == 1     # rank 0's alone
    assert len(built["sft.py"]) == 6                                        # those three on both ranks
    assert policies == {"none": "runs/tiny/sft-none/policy", **dict.fromkeys(("two-phase", "linear"), "runs/tiny/sft/policy")}
    assert vars(vae_script.parse_args(built["vae.py"][0])) == vars(vae_script.parse_args([]))
    for argv, alone in zip(built["sft.py"], (["pretrain"], ["--prefix", "none"], [])):
        settings = [{k: v for k, v in vars(sft.parse_args(flags)).items() if k not in ("resume", "device")}
                    for flags in (argv, alone)]
        assert settings[0] == settings[1]


def test_runs_are_named_and_start_from_the_warm_up_of_their_kind(tmp_path, monkeypatch):
    started = {}
    monkeypatch.setattr(sft, "prepare", lambda args, _: {name: "plain" if name == "none" else "prefixed" for name in args.schedule})
    monkeypatch.setattr(grpo, "train_one", lambda args, _, run, start:
                        started.update({run.folder.name: (start, args.schedule, args.seed, run.keep)}))
    monkeypatch.setattr(grpo.evaluate, "close_rl", lambda _, folders, *__: started.update(folders=folders))
    schedules = ["none", "linear", "0:0", "0:1,0.5:0"]
    grpo.main(["--schedule", *schedules, "--source", "noise", "--seed", "0", "3", "--out", str(tmp_path), "--device", "cpu",
               "--keep", "5"])
    assert {name: len(runs) for name, runs in started.pop("folders").items()} == dict.fromkeys(schedules, 2)
    assert {name: start for name, start in started.items() if name.endswith("3")} == {
        "grpo-none-s3": ("plain", "none", 3, 5), "grpo-linear-noise-s3": ("prefixed", "linear", 3, 5),
        "grpo-rho0=0-noise-s3": ("prefixed", "0:0", 3, 5), "grpo-rho0=1_0.5=0-noise-s3": ("prefixed", "0:1,0.5:0", 3, 5)}


def test_a_run_is_made_as_the_flags_say(tmp_path, policy_folder, vae, monkeypatch):
    """--kl: a frozen copy of the start; --independent, --length and --source reach the palette; a run without prefix needs none."""
    vae.save(tmp_path / "vae")
    runs = []
    monkeypatch.setattr(sft, "prepare", lambda args, _: dict.fromkeys(args.schedule, str(policy_folder)))
    monkeypatch.setattr(grpo.evaluate, "close_rl", lambda *_: None)
    monkeypatch.setattr(grpo, "train", lambda model, _1, _2, palette, _3, _4, reference: runs.append((model, palette, reference)))
    common = ["--vae", str(tmp_path / "vae"), "--schedule", "linear", "none", "--device", "cpu", "--out"]
    grpo.main([*common, str(tmp_path / "a"), "--kl", "0.1", "--independent", "--length", "5", "--source", "math"])
    grpo.main([*common, str(tmp_path / "b")])
    (model, palette, reference), (_, none, _), (_, tiled, absent), _ = runs
    assert (palette.source, palette.tiled, palette.length, none.source, none.length) == ("math", False, 5, "none", 0)
    assert (tiled.source, tiled.tiled, tiled.length, absent) == ("prior", True, 8, None)
    assert not any(p.requires_grad for p in reference.parameters()) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, q) and p is not q for p, q in zip(model.parameters(), reference.parameters()))


def test_domains_are_asked_of_the_vae_as_soon_as_there_is_one(tmp_path, vae, monkeypatch):
    """The VAE names the domains, not the traces; where the rows do, before the first run and not after the last."""
    vae.save(tmp_path / "vae")
    monkeypatch.setattr(sft, "prepare", lambda args, _: setattr(args, "vae", str(tmp_path / "vae")) or {})
    monkeypatch.setattr(grpo, "train_one", lambda *_: 1 / 0)
    (tmp_path / "rows.jsonl").write_text('{"question": "", "answer": "so", "domain": "math"}')
    for argv, message in ((["--traces", f"foo={tmp_path}/rows.jsonl", "--vae", str(tmp_path / "vae"), "--source", "foo"], "'foo'"),
                          (["--traces", str(tmp_path / "rows.jsonl"), "--source", "poetry"], "unknown prefix source 'poetry'"),
                          (["--traces", str(tmp_path / "rows.jsonl"), "--arms", "greedy", "poetry"], "unknown arm 'poetry'")):
        with pytest.raises(ValueError, match=message):
            grpo.main([*argv, "--out", str(tmp_path / "out"), "--device", "cpu"])


def test_what_changes_a_run_is_among_its_settings():
    """So it cannot differ when the run is resumed; what is not, may."""
    free = {"out", "resume", "overwrite", "device", "tokens_per_batch", "save_every", "keep", "fsdp", "checkpointing", "slots",
            "arms", "arm_questions", "arm_samples", "base_seed", "base_steps", "sft_lr", "sft_batch", "limit", "vae", "traces"}
    settings = next(grpo.runs_of(grpo.parse_args([])))[2]
    assert set(settings) == set(vars(grpo.parse_args([]))) - free and free == set(grpo.NOT_RESULTS)


def test_a_folder_with_another_run_is_refused_before_the_first_run_of_several(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "prepare", lambda *_: 1 / 0)
    Run(tmp_path / "grpo-linear-s1", {"lr": 1.0}, ALONE)
    with pytest.raises(ValueError, match="grpo-linear-s1 holds a run with another lr"):
        grpo.main(["--schedule", "none", "linear", "--seed", "0", "1", "--out", str(tmp_path), "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["grpo-linear-s1"]


# ---- the command line ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["--group", "1"], "--group: must be at least 2, not 1"), (["--length", "-1"], "--length: must be at least 0, not -1"),
    (["--steps", "0"], "--steps: must be at least 1, not 0"), (["--resample", "-1"], "--resample: must be at least 0"),
    (["--clip-low", "nan"], "--clip-low: must be at least 0 and finite, not nan"), (["--algorithm", "ppo"], "invalid choice: 'ppo'"),
    (["--kl", "inf"], "--kl: must be at least 0 and finite, not inf"), (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
    (["--keep", "0"], "--keep: must be at least 1, not 0"),
])
def test_bad_flags_end_with_one_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.parse_args(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--temperature", "0"], "--temperature must be above 0"), (["--model", "some/model"], "--traces is needed"),
    (["--source", "poetry"], "unknown prefix source 'poetry'"), (["--arms", "poetry"], "unknown arm 'poetry'"),
    (["--reward", "beauty=1"], "unknown reward 'beauty'"), (["--reward", "accuracy=much"], "NAME=WEIGHT"),
    (["--schedule", "zigzag"], "--schedule 'zigzag' is none of none, constant"), (["--schedule", "0:1,0.5"], "'0:1,0.5' is none"),
    (["--schedule", "0:2"], "between 0 and 1"), (["--schedule", "0.5:1,0:0"], "of rising tau"), (["--schedule", "0:nan"], "between"),
    (["--tis", "0.5"], "--tis must be 0 (off) or at least 1"), (["--reward", "accuracy=nan"], "accuracy=nan is not a number"),
    (["--seed", "1", "2", "1"], "--seed names a run twice"), (["--schedule", "none", "none"], "--schedule names a run twice"),
    (["--length", "0"], "injects nothing"), (["--source", "none", "--schedule", "none", "linear"], "injects nothing"),
    (["--reward", "accuracy=0"], "a weight that is not 0"), (["--reward", "format=1", "format=2"], "each name once"),
    (["--top-p", "0"], "0 < top_p <= 1"), (["--prompts", "3", "--minibatches", "2"], "cannot be split over 1 ranks x 2 minibatches"),
])
def test_flags_that_cannot_work_together_end_before_any_work(argv, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sft, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ValueError) as problem:
        grpo.main([*argv, "--out", str(tmp_path)])
    assert message in str(problem.value) and not list(tmp_path.iterdir())


def test_bad_input_ends_before_any_work_with_one_sentence_and_status_1(tmp_path):
    for argv, message in ((["--task", "mine", "--train-data", "nowhere.jsonl", "--test-data", "x"], "no such file: nowhere"),
                          (["--prompts", "8", "--minibatches", "3"], "cannot be split over 1 ranks x 3 minibatches"),
                          (["--traces", "math=t.jsonl"], "no such file: t.jsonl"),
                          (["--model", "/nowhere", "--task", "tiny", "--traces", "hub:t", "--out", str(tmp_path)], "nowhere")):
        command = [sys.executable, str(ROOT / "grpo.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("changes, message", [
    (dict(max_prompt=4), "a prompt of 1[0-9] tokens is over --max-prompt 4.*'(calc|take)"),
    (dict(length=300), "--length 300, a prompt of 1[0-9] tokens and --max-new-tokens 12 are more than the 256 positions")])
def test_a_prompt_that_is_too_long_is_named_before_any_work(policy_folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(sft, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=message):
        grpo.main(as_flags(model=policy_folder, task="tiny", traces=["hub:t"], out=tmp_path, max_new_tokens=12, **changes))


def test_a_task_with_images_is_refused_for_the_model_that_reads_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="tiny reads text only: use --model tiny-vl"):
        grpo.main(["--task", "tiny-vl", "--out", str(tmp_path)])
