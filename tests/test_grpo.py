"""grpo.py: formulas by hand, the update, the loop with exact resume, the job, the command line.

What is computed by hand here uses none of the functions of grpo.py that it checks. Other test
files may use the helpers of the second section.
"""

import copy
import dataclasses
import gc
import inspect
import json
import math
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import evaluate
import grpo
import rewards
import sft
import tiny_world
import vae as vae_script
from grpo import (
    ALGORITHMS,
    GRPO,
    GRPOConfig,
    Rollout,
    RunPlan,
    Sampler,
    Tokens,
    advantages,
    check,
    collect,
    compare,
    guided_count,
    loss_of,
    measure,
    plan,
    points_of,
    policy_loss,
    prepare,
    rho_at,
    run_plans,
    score_under,
    train,
    train_policy,
    train_run,
    update,
    weigh,
)
from prefix import PRECISIONS, SOURCES, Decoder, Palette, Prefix, Prompt, end_ids, load_policy
from rewards import Task, load_rewards, load_task
from sft import Ranks, Run, make_optimizer, seed_of
from vae import Reader, parse_settings, read_json, run_main

ALONE = Ranks.alone()
ROOT = Path(grpo.__file__).resolve().parent


# ---- formulas by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, expected",
    [
        # (1, 0, 0, 0): mean 1/4, sample variance ((3/4)^2 + 3 (1/4)^2) / 3 = 1/4, so std 1/2
        ("mean-std", [1.5, -0.5, -0.5, -0.5]),
        ("mean", [0.75, -0.25, -0.25, -0.25]),
        ("leave-one-out", [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_advantages_by_hand(how, expected):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    values = advantages(rewards, how)
    torch.testing.assert_close(values, torch.tensor([expected, [0.0] * 4]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("none", [0, 0, 0, 0, 0]),
        ("constant", [1, 1, 1, 1, 1]),
        ("two-phase", [1, 1, 1, 0, 0]),
        ("linear", [1, 0.75, 0.51, 0.5, 0.25]),
        ("0:0.3", [0.3, 0.3, 0.3, 0.3, 0.3]),
        ("0.25:0,0.75:1", [0, 0, 0.48, 0.5, 1]),
        ("0:0,0.5:0.5,0.5:1,1:0", [0, 0.25, 0.49, 1, 0.5]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    points = points_of(schedule)
    values = [rho_at(points, tau) for tau in (0.0, 0.25, 0.49, 0.5, 0.75)]
    assert values == pytest.approx(expected)


@pytest.mark.parametrize(
    "rho, group", [(0.0, 8), (1.0, 8), (0.5, 8), (0.3, 8), (0.0625, 8), (1 / 3, 3), (0.9, 7)]
)
def test_the_share_of_guided_rollouts_is_right_on_average(rho, group):
    counts = [guided_count(rho, group, (i + 0.5) / 1000) for i in range(1000)]
    assert sum(counts) / 1000 == pytest.approx(rho * group, abs=2e-3)
    assert max(counts) - min(counts) <= 1
    assert max(counts) <= group


def tokens_of(old, rollout_of_token=None, advantage=(1.0,), sampler=None, reference=None):
    """Tokens with weight 1; log-probs as lists of numbers."""
    if rollout_of_token is None:
        rollout_of_token = [0] * len(old)
    tokens = Tokens(
        rollout_of_token=torch.tensor(rollout_of_token),
        sampler_logprobs=torch.tensor(sampler or old),
        old_logprobs=torch.tensor(old),
        reference_logprobs=None,
        advantage=torch.tensor(advantage),
        weight=torch.ones(len(advantage)),
    )
    if reference is not None:
        tokens.reference_logprobs = torch.tensor(reference)
    return tokens


@pytest.mark.parametrize(
    "ratio, advantage, clip_high, loss, gradient, is_clipped",
    [
        (1.0, 2.0, 0.2, -2.0, -2.0, False),
        (1.5, 2.0, 0.2, -2.4, 0.0, True),  # a gain is clipped at 1.2
        (1.5, -2.0, 0.2, 3.0, 3.0, False),  # a loss is not clipped away
        (0.5, 2.0, 0.2, -1.0, -1.0, False),
        (0.5, -2.0, 0.2, 1.6, 0.0, True),
        (1.25, 2.0, 0.28, -2.5, -2.5, False),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, clip_high, loss, gradient, is_clipped):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    tokens = tokens_of(old=[0.0], advantage=[advantage])
    result, per_token = policy_loss(logprobs, tokens, clip_high=clip_high)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert per_token["clip_share"].item() == is_clipped


def test_the_k3_kl_by_hand():
    """x = 1/2: k3 = x - log x - 1, and its derivative by log pi is 1 - x."""
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    tokens = tokens_of(old=[math.log(0.5)], advantage=[0.0], reference=[math.log(0.25)])
    loss, per_token = policy_loss(logprobs, tokens, kl=0.1)
    loss.backward()
    k3 = 0.5 - math.log(0.5) - 1
    assert per_token["kl"].item() == pytest.approx(k3)
    assert loss.item() == pytest.approx(0.1 * k3)
    assert logprobs.grad.item() == pytest.approx(0.1 * (1 - 0.5))


def test_truncated_importance_weights_by_hand():
    """pi_old draws tokens 3, 1 and 1/2 times as often as the sampler; the cap is 2.

    So they weigh 2, 1 and 1/2: constants, nothing is differentiated through them.
    """
    logprobs = torch.zeros(3, requires_grad=True)
    sampler = [-math.log(3.0), 0.0, math.log(2.0)]
    tokens = tokens_of([0.0] * 3, [0, 0, 1], advantage=[1.0, -2.0], sampler=sampler)
    loss, per_token = policy_loss(logprobs, tokens, tis=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(-2 - 1 + 2 * 0.5)
    assert logprobs.grad.tolist() == pytest.approx([-2.0, -1.0, 1.0])
    assert per_token["tis_weight"].tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert per_token["log_ratio"].tolist() == pytest.approx([math.log(3), 0, math.log(2)])


def test_no_importance_weight_without_tis_or_without_a_gap():
    without_gap = tokens_of([0.0] * 3, [0, 0, 1], advantage=[1.0, -2.0])
    gap = [-math.log(3.0), 0.0, math.log(2.0)]
    with_gap = dataclasses.replace(without_gap, sampler_logprobs=torch.tensor(gap))
    off, _ = policy_loss(torch.zeros(3), with_gap, tis=0.0)
    same, _ = policy_loss(torch.zeros(3), without_gap, tis=2.0)
    assert off.item() == same.item() == -1 - 1 + 2


def finished_rollout(length, reward, finish="stop"):
    """A judged rollout of `length` tokens, each sampled with log-prob -1."""
    return Rollout(
        prompt_number=0,
        row={},
        prompt=Prompt([5, 6]),
        prefix=Prefix(),
        seed=0,
        completion_ids=[7] * length,
        logprobs=[-1.0] * length,
        finish=finish,
        rewards={"accuracy": reward},
        reward=reward,
    )


A = 0.5 / (0.5**0.5 + 1e-4)  # rewards (1, 0): mean 1/2, sample standard deviation sqrt(1/2)
LOSS_BY_HAND = {
    # A token of ratio 3/2 with reward 1; three of ratios 1/2, 1, 4 with reward 0; limit 10.
    "grpo": -(1.2 * A / 1 + (-0.8 - 1 - 4) * A / 3) / 2,  # each completion's mean, their mean
    "rloo": -(1.2 - 0.8 - 1 - 4) * 1 / 20,  # each is the other's baseline: advantages 1, -1
    "dr-grpo": -(1.2 - 0.8 - 1 - 4) * 0.5 / 20,  # advantages 1/2 and -1/2
    "dapo": -(1.28 - 0.8 - 1 - 4) * A / 4,  # four tokens, clipped at 1.28
    # The geometric mean of 1/2, 1, 4 is the cube root of 2; 3/2 is clipped at 1.0004.
    "gspo": -(1.0004 - 2 ** (1 / 3)) * A / 2,
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_by_hand(algorithm):
    config = GRPOConfig(algorithm=algorithm, group=2, max_new_tokens=10)
    rollouts = [finished_rollout(1, reward=1.0), finished_rollout(3, reward=0.0)]
    compare(rollouts, config)
    weigh(rollouts, config, ALONE)
    logprobs = torch.tensor([1.5, 0.5, 1.0, 4.0]).log() - 1.0
    loss, _ = loss_of(rollouts, logprobs, torch.zeros(4), config)
    assert loss.item() == pytest.approx(LOSS_BY_HAND[algorithm], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    "mean_over, truncated, expected",
    [
        # Completions of 2, 3 and 5 tokens, the last one cut off; --max-new-tokens 10.
        ("token", "keep", [1 / 10, 1 / 10, 1 / 10]),
        ("sequence", "keep", [1 / 6, 1 / 9, 1 / 15]),
        ("constant", "keep", [1 / 30, 1 / 30, 1 / 30]),
        ("token", "penalise", [1 / 10, 1 / 10, 1 / 10]),
        # Masked, it is in neither numerator nor denominator.
        ("token", "mask", [1 / 5, 1 / 5, 0]),
        ("sequence", "mask", [1 / 4, 1 / 6, 0]),
        ("constant", "mask", [1 / 20, 1 / 20, 0]),
    ],
)
def test_token_weights_by_hand(mean_over, truncated, expected):
    config = GRPOConfig(mean_over=mean_over, truncated=truncated, max_new_tokens=10)
    rollouts = [
        finished_rollout(2, reward=1.0),
        finished_rollout(3, reward=0.0),
        finished_rollout(5, reward=0.0, finish="length"),
    ]
    weigh(rollouts, config, ALONE)
    assert [rollout.weight for rollout in rollouts] == pytest.approx(expected)


def test_where_all_are_masked_nothing_weighs_and_nothing_is_divided_by_zero():
    config = GRPOConfig(truncated="mask")
    rollouts = [finished_rollout(n, reward=1.0, finish="length") for n in (2, 3)]
    for rollout in rollouts:
        rollout.weight = 1.0  # of the update before
    weigh(rollouts, config, ALONE)
    assert [rollout.weight for rollout in rollouts] == [0, 0]


def test_groups_without_signal_are_exactly_zero():
    """The float mean of three 0.9 is not 0.9."""
    config = GRPOConfig(group=3)
    rollouts = [finished_rollout(1, reward) for reward in (0.9, 0.9, 0.9, 0.0, 1.0, 0.0)]
    compare(rollouts, config)
    values = [rollout.advantage for rollout in rollouts]
    assert values[:3] == [0.0, 0.0, 0.0]
    assert values[4] > 0 > values[3] == values[5]


# ---- helpers: a small policy, its task, its rollouts ---------------------------------------------


def small_config(**changes):
    """Settings of a very short run on the tiny world."""
    settings = {
        "schedule": ["linear"],
        "steps": 4,
        "prompts": 4,
        "group": 4,
        "length": 3,
        "max_new_tokens": 12,
        "eval_questions": 8,
        "eval_every": 2,
        "save_every": 1,
    }
    return GRPOConfig(**{**settings, **changes})


def starts_evenly(completion, row):
    """Right if the first word has an even number of letters: so are about half of random ones."""
    words = completion.split()
    is_even = bool(words) and len(words[0]) % 2 == 0
    return {"accuracy": float(is_even), "answered": 1.0}


def first_word_task():
    """32 training and 8 test questions of the tiny world, judged by starts_evenly."""
    return Task(
        "first",
        train=tiny_world.load("train")[:32],
        test=tiny_world.load("test")[:8],
        judge_function=starts_evenly,
    )


def make_sampler(model, reader, vae, task, config, source="prior", ends=None, slots=64):
    """What grpo.train_run makes for a run. ends: end tokens, if not the model's own."""
    if ends is None:
        ends = end_ids(model, reader.tokenizer)
    decoder = Decoder(model, ends, slots, dtype=PRECISIONS[config.rollout_precision])
    table = model.get_input_embeddings().weight.detach()
    palette = Palette(vae, table, source, config.length, tiled=not config.independent)
    rewards = load_rewards(config.reward, task)
    schedule = points_of(config.schedule[0])
    return Sampler(decoder, reader, task, rewards, palette, schedule, config.seed[0])


@dataclass
class TinySetup:
    """An untrained tiny policy, new for every test, and what its rollouts need."""

    model: torch.nn.Module
    reader: Reader
    vae: vae_script.VAE
    task: Task

    def sampler(self, config, task=None, **changes):
        task = task or self.task
        return make_sampler(
            self.model, self.reader, self.vae, task, config, **{"slots": 5, **changes}
        )

    def rollouts(self, config, step=1, ranks=ALONE, **changes):
        """The compared rollouts of one step; changes: of the sampler."""
        return collect(step, self.sampler(config, **changes), config, ranks)


@pytest.fixture
def tiny(model, reader, vae):
    return TinySetup(model, reader, vae, first_word_task())


# With every tenth word an end token, random completions have uneven lengths, and some are cut off.
# The pad word, 0, is one: its embedding, zeros, would have by far the largest gradient as an input.
MANY_ENDS = list(range(0, len(tiny_world.VOCABULARY), 10))


def guided_of(rollouts):
    return [rollout for rollout in rollouts if rollout.guided]


def unguided_of(rollouts):
    return [rollout for rollout in rollouts if not rollout.guided]


def finished_of(rollouts):
    return [rollout for rollout in rollouts if rollout.finish == "stop"]


def cut_off_of(rollouts):
    return [rollout for rollout in rollouts if rollout.finish == "length"]


def count_tokens(rollouts):
    return sum(len(rollout.completion_ids) for rollout in rollouts)


def latents_of(rollouts):
    """The latents of the guided rollouts, each as a tuple of numbers."""
    return [tuple(rollout.prefix.latent.flatten().tolist()) for rollout in guided_of(rollouts)]


def groups_of_four(rollouts):
    return [rollouts[start : start + 4] for start in range(0, len(rollouts), 4)]


@dataclass
class Call:
    """A call that `watch` saw."""

    arguments: inspect.BoundArguments
    result: object

    def __getitem__(self, name):
        return self.arguments.arguments[name]


def watch(monkeypatch, owner, name):
    """The Calls of the function owner.name from now on, in a list that grows."""
    calls = []
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def watched(*arguments, **keywords):
        bound = signature.bind(*arguments, **keywords)
        result = original(*arguments, **keywords)
        calls.append(Call(bound, result))
        return result

    monkeypatch.setattr(owner, name, watched)
    return calls


def fail(*_, **__):
    """Stands in for what must not be called."""
    raise AssertionError("this must not be called")


@dataclass
class Gradient:
    """What one update hands to the optimizer, and what it measures."""

    by_name: dict  # {parameter: Tensor}
    sums: dict  # {metric: sum over all trained tokens}

    def mean(self, name):
        return self.sums[name] / self.sums["tokens"]


def gradient_of(model, rollouts, config, ranks=ALONE):
    """The Gradient of an update that is not applied."""
    by_name = {}

    def keep_gradients(model, optimizers, ranks):
        for name, p in model.named_parameters():
            by_name[name] = torch.zeros_like(p)
            if p.grad is not None:
                by_name[name] = p.grad.clone()
        model.zero_grad()
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "apply_gradients", keep_gradients)
        result = update(model, None, rollouts, config, ranks)
    sums = {name: both.sum().item() for name, both in result.sums.items()}
    return Gradient(by_name, sums)


def assert_same_gradients(one, other, atol=1e-6, scale=1.0):
    """scale * one = other, parameter by parameter; neither is zero."""
    assert one.keys() == other.keys()
    assert max(value.abs().max() for value in other.values()) > 10 * atol
    for name in one:
        torch.testing.assert_close(
            scale * one[name], other[name], atol=atol, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def set_references(rollouts, reference, config, ranks=ALONE):
    """What train_policy does for a KL term."""
    for rollout, logprobs in zip(rollouts, score_under(reference, rollouts, config, ranks)):
        rollout.reference_logprobs = logprobs


# ---- the update ----------------------------------------------------------------------------------


def logits_of(model, rollout):
    """[N, V]: what predicts each completion token, by a plain forward pass of one row."""
    ids = torch.tensor(rollout.prompt.ids + rollout.completion_ids)
    inputs = model.get_input_embeddings()(ids)  # [T, d]
    if rollout.guided:
        inputs = torch.cat([rollout.prefix.embeddings, inputs])
    logits = model(inputs_embeds=inputs[None]).logits[0]
    return logits[-len(rollout.completion_ids) - 1 : -1]


def normaliser_by_hand(algorithm, rollout, weighed, max_new_tokens):
    """What the log-probs of a rollout's tokens are divided by."""
    if algorithm in ("grpo", "gspo"):
        return len(rollout.completion_ids) * len(weighed)
    if algorithm == "dapo":
        return count_tokens(weighed)
    return max_new_tokens * len(weighed)  # rloo, dr-grpo


def gradient_by_hand(model, algorithm, weighed, max_new_tokens, temperature):
    """Of -sum A log p / normaliser, one rollout after the other."""
    loss = 0.0
    for rollout in weighed:
        logp = (logits_of(model, rollout) / temperature).log_softmax(-1)
        targets = torch.tensor(rollout.completion_ids)
        logp_of_completion = logp.gather(1, targets[:, None]).sum()
        normaliser = normaliser_by_hand(algorithm, rollout, weighed, max_new_tokens)
        loss = loss - rollout.advantage * logp_of_completion / normaliser
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("truncated", ["keep", "mask"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gradient_of_the_first_update_is_the_formula(tiny, algorithm, truncated):
    """On policy log-ratios are 0, and the gradient is that of -sum A log p / normaliser.

    A clip changes nothing there, and the gradient of a completion's geometric mean ratio is that
    of its mean log-prob. Temperature 0.7; guided and unguided rollouts of uneven lengths, end
    tokens, truncated ones, a group without signal.
    """
    config = small_config(
        algorithm=algorithm,
        truncated=truncated,
        temperature=0.7,
        resample=0,
        prompts=16,
        max_new_tokens=16,
    )
    rollouts = tiny.rollouts(config, step=2, ends=MANY_ENDS)
    for rollout in rollouts[:4]:
        rollout.advantage = 0.0  # no gradient, but the group counts in the normaliser

    weighed = rollouts
    if truncated == "mask":
        weighed = finished_of(rollouts)
    trained = [rollout for rollout in weighed if rollout.advantage != 0]

    # What this stands on.
    assert count_tokens(guided_of(trained)) > 50
    assert count_tokens(unguided_of(trained)) > 50
    assert len({len(rollout.completion_ids) for rollout in trained}) >= 6
    assert len(cut_off_of(rollouts)) >= 2
    assert (len(cut_off_of(trained)) >= 2) == (truncated == "keep")

    gradient = gradient_of(tiny.model, rollouts, config)
    assert gradient.sums["tokens"] == count_tokens(trained)
    assert gradient.mean("log_ratio") < 1e-5
    by_hand = gradient_by_hand(tiny.model, algorithm, weighed, max_new_tokens=16, temperature=0.7)
    assert_same_gradients(gradient.by_name, by_hand, atol=2e-6)


def test_two_pairs_of_algorithms_agree_on_policy(tiny):
    rollouts = tiny.rollouts(small_config())
    gradients = {}
    for algorithm in ("grpo", "gspo", "rloo", "dr-grpo"):
        config = small_config(algorithm=algorithm)
        compare(rollouts, config)
        gradients[algorithm] = gradient_of(tiny.model, rollouts, config).by_name
    assert_same_gradients(gradients["grpo"], gradients["gspo"])
    assert_same_gradients(gradients["rloo"], gradients["dr-grpo"], scale=3 / 4)


def off_policy_rollouts(tiny, config):
    """Ratios off 1, some of them clipped; uneven lengths; one group without signal."""
    rollouts = tiny.rollouts(config)
    for rollout in rollouts[:4]:
        rollout.advantage = 0.0
    noise = random.Random(0)
    for i, rollout in enumerate(rollouts):
        length = 1 + i % 7
        rollout.completion_ids = rollout.completion_ids[:length]
        rollout.logprobs = [x + noise.gauss(0, 0.3) for x in rollout.logprobs[:length]]
        rollout.finish = "length" if i % 3 == 0 else "stop"
    if config.kl:
        set_references(rollouts, tiny_world.make_model(seed=2), config)
    return rollouts


VARIANTS = [{"algorithm": algorithm} for algorithm in ALGORITHMS]
VARIANTS += [{"truncated": "mask"}, {"truncated": "penalise", "tis": 1.5}, {"kl": 0.2}]


def name_of(changes):
    return "-".join(str(value) for value in changes.values())


@pytest.mark.parametrize("changes", VARIANTS, ids=name_of)
def test_the_gradient_does_not_depend_on_micro_batches(tiny, changes):
    config = small_config(resample=0, **changes)
    rollouts = off_policy_rollouts(tiny, config)
    longest = max(rollout.positions for rollout in rollouts)
    gradients = []
    for rows in (1, 3, 8, 100):
        split = dataclasses.replace(config, tokens_per_batch=rows * longest)
        gradients.append(gradient_of(tiny.model, rollouts, split))

    one_by_one = gradients[0]
    for gradient in gradients[1:]:
        assert_same_gradients(one_by_one.by_name, gradient.by_name)
        assert gradient.sums == pytest.approx(one_by_one.sums, rel=1e-5)
    if not config.tis:  # with it pi_old is this very forward, so that nothing is clipped
        assert one_by_one.sums["clip_share"] > 0


class RankOfTwo(Ranks):
    """One of two ranks, which is told the sums over both."""

    sums_of_both = None

    def all_reduce_sum(self, numbers):
        return self.sums_of_both


@pytest.mark.parametrize("changes", VARIANTS, ids=name_of)
def test_the_gradients_of_two_ranks_add_up_to_that_of_one(tiny, changes):
    config = small_config(resample=0, **changes)
    rollouts = off_policy_rollouts(tiny, config)
    alone = gradient_of(tiny.model, rollouts, config)

    weighed = rollouts
    if config.truncated == "mask":
        weighed = finished_of(rollouts)
    halves = []
    for rank in (0, 1):
        ranks = RankOfTwo(rank, 2, ALONE.device)
        ranks.sums_of_both = [count_tokens(weighed), len(weighed)]
        share = [rollout for rollout in rollouts if rollout.prompt_number % 2 == rank]
        halves.append(gradient_of(tiny.model, share, config, ranks).by_name)
    both = {name: halves[0][name] + halves[1][name] for name in alone.by_name}
    assert_same_gradients(both, alone.by_name)


def test_an_end_token_is_learnt(model, tokenizer):
    """Bug 1 of design.md: a completion that is nothing but its end token becomes likelier."""
    end = tokenizer.eos_token_id

    def logprob_of_end():
        logits = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
        return logits.log_softmax(-1)[end].item()

    before = logprob_of_end()
    rollout = finished_rollout(1, reward=1.0)
    rollout.completion_ids = [end]
    rollout.logprobs = [before]
    rollout.advantage = 1.0
    update(model, make_optimizer(model, 1e-3), [rollout], small_config(), ALONE)
    assert logprob_of_end() > before + 0.01


def test_truncated_completions_are_kept_penalised_or_masked(tiny):
    rollouts = {}
    for truncated in ("keep", "penalise", "mask"):
        config = small_config(truncated=truncated)
        rollouts[truncated] = tiny.rollouts(config, ends=MANY_ENDS)
    finishes = [rollout.finish for rollout in rollouts["keep"]]
    assert set(finishes) == {"stop", "length"}

    for kept, penalised, masked in zip(*rollouts.values()):
        assert kept.completion_ids == penalised.completion_ids == masked.completion_ids
        assert kept.rewards == penalised.rewards == masked.rewards
        penalty = float(kept.finish == "length")
        assert penalised.reward == kept.reward - penalty
        assert masked.reward == kept.reward
        assert masked.advantage == kept.advantage  # it stays in its group's baseline


def test_importance_weights_scale_the_gradient(tiny):
    """A sampler that draws every token 1.5 times too rarely: each weighs 1.5, or the cap."""
    rollouts = tiny.rollouts(small_config())
    without_gap = gradient_of(tiny.model, rollouts, small_config()).by_name
    no_correction = gradient_of(tiny.model, rollouts, small_config(tis=2.0)).by_name
    assert_same_gradients(without_gap, no_correction)

    for rollout in rollouts:
        rollout.logprobs = [x - math.log(1.5) for x in rollout.logprobs]
    corrected = gradient_of(tiny.model, rollouts, small_config(tis=2.0))
    assert_same_gradients(without_gap, corrected.by_name, scale=1.5)
    assert corrected.sums["clip_share"] == 0
    assert corrected.mean("tis_weight") == pytest.approx(1.5, abs=1e-4)
    assert corrected.mean("log_ratio") == pytest.approx(math.log(1.5), abs=1e-4)

    capped = gradient_of(tiny.model, rollouts, small_config(tis=1.2))
    assert_same_gradients(without_gap, capped.by_name, scale=1.2)
    uncorrected = gradient_of(tiny.model, rollouts, small_config())
    assert uncorrected.sums["clip_share"] > 0  # the gap is taken for an update


def test_rollouts_in_bfloat16_are_corrected_by_tis(tiny):
    """The metrics show the gap between sampler and policy; with --tis it clips no token."""
    narrow = {"rollout_precision": "bf16", "clip_low": 1e-3, "clip_high": 1e-3}
    config = small_config(tis=2.0, **narrow)
    rollouts = tiny.rollouts(config)
    corrected = gradient_of(tiny.model, rollouts, config)
    assert 1e-4 < corrected.mean("log_ratio") < 0.2
    assert corrected.mean("tis_weight") != 1
    assert corrected.sums["clip_share"] == 0
    uncorrected = gradient_of(tiny.model, rollouts, small_config(**narrow))
    assert uncorrected.sums["clip_share"] > 0


def test_pi_old_stays_what_it_was_at_the_first_epoch(tiny):
    """Once it is scored, later updates leave the clip range that is measured from it."""
    config = small_config(tis=2.0, epochs=3)
    rollouts = [rollout for rollout in tiny.rollouts(config) if rollout.advantage]
    for rollout, logprobs in zip(rollouts, score_under(tiny.model, rollouts, config, ALONE)):
        rollout.old_logprobs = logprobs
        assert logprobs == pytest.approx(rollout.logprobs, abs=1e-5)
    before = [list(rollout.old_logprobs) for rollout in rollouts]

    optimizer = make_optimizer(tiny.model, 3e-3)
    clipped = []
    for _epoch in range(3):
        result = update(tiny.model, optimizer, rollouts, config, ALONE)
        clipped.append(result.sums["clip_share"].sum().item())
    assert clipped[0] == 0 < clipped[2]
    assert [rollout.old_logprobs for rollout in rollouts] == before


def test_a_kl_term_pulls_towards_the_reference(tiny):
    config = small_config(kl=0.5)
    rollouts = tiny.rollouts(config)
    set_references(rollouts, copy.deepcopy(tiny.model), config)

    def kl_of_update(lr):
        optimizer = make_optimizer(tiny.model, lr)
        return update(tiny.model, optimizer, rollouts, config, ALONE).sums["kl"].sum().item()

    assert kl_of_update(lr=1e-2) == pytest.approx(0.0, abs=1e-4)  # it still is the reference
    before = kl_of_update(lr=1e-2)
    assert before > 1e-3

    for rollout in rollouts:
        rollout.advantage = 0.0  # nothing but the KL term is left, and silent rollouts count
    optimizer = make_optimizer(tiny.model, 3e-3)
    for _ in range(10):
        result = update(tiny.model, optimizer, rollouts, config, ALONE)
    assert 0 < result.sums["kl"].sum().item() < 0.5 * before


def test_the_settings_of_the_loss_reach_it(tiny, monkeypatch):
    settings = {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.3, "tis": 4.0, "kl": 0.5}
    config = small_config(**settings)
    rollouts = tiny.rollouts(config)
    set_references(rollouts, tiny.model, config)
    calls = watch(monkeypatch, grpo, "policy_loss")
    update(tiny.model, make_optimizer(tiny.model, 1e-3), rollouts, config, ALONE)
    assert len(calls) >= 1
    for call in calls:
        for name, value in settings.items():
            assert call[name] == value, name


def test_silent_rollouts_cost_no_forward_pass(tiny, monkeypatch):
    config = small_config()
    rollouts = tiny.rollouts(config)
    for rollout in rollouts:
        rollout.advantage = 0.0
    monkeypatch.setattr(grpo, "completion_logprobs", fail)
    before = copy.deepcopy(tiny.model.state_dict())
    result = update(tiny.model, make_optimizer(tiny.model, 1e-3), rollouts, config, ALONE)
    assert result.gradient_norm == 0.0
    assert not any(both.any() for both in result.sums.values())
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_masked_completions_cost_no_forward_pass(tiny, monkeypatch):
    config = small_config(truncated="mask")
    rollouts = tiny.rollouts(config, ends=MANY_ENDS)
    calls = watch(monkeypatch, grpo, "completion_logprobs")
    update(tiny.model, make_optimizer(tiny.model, 1e-3), rollouts, config, ALONE)
    scored = []
    for call in calls:
        scored += call["completions"]
    trained = []
    for rollout in rollouts:
        if rollout.finish == "stop" and rollout.advantage:
            trained.append(rollout.completion_ids)
    assert sorted(scored) == sorted(trained)
    assert 0 < len(scored) < len(rollouts)


def test_micro_batches_hold_as_many_positions_as_allowed(tiny, monkeypatch):
    """Of prefix, prompt and completion, with the pads to the longest row."""
    config = small_config(tokens_per_batch=90, schedule=["constant"], length=8)
    rollouts = tiny.rollouts(config, ends=MANY_ENDS)
    calls = watch(monkeypatch, grpo, "completion_logprobs")
    update(tiny.model, make_optimizer(tiny.model, 1e-3), rollouts, config, ALONE)
    sizes = []
    for call in calls:
        lengths = []
        for prompt, completion in zip(call["prompts"], call["completions"]):
            lengths.append(8 + len(prompt.ids) + len(completion))
        sizes.append(len(lengths) * max(lengths))
    assert max(sizes) <= 90
    assert max(len(call["prompts"]) for call in calls) > 1


def test_filters_of_the_sampling_are_those_of_the_scoring(tiny):
    """Bug 2 of design.md: sampled with top-p, top-k and a temperature, scored without."""
    config = small_config(temperature=0.8, top_p=0.7, top_k=20)
    gradient = gradient_of(tiny.model, tiny.rollouts(config), config)
    assert gradient.sums["tokens"] > 50
    assert gradient.mean("log_ratio") < 1e-5
    assert gradient.mean("entropy") < math.log(20)


# ---- rollouts: plan, generate, judge, compare ----------------------------------------------------


def test_who_is_guided_and_who_shares_a_latent(tiny):
    for latent_per, distinct in (("rollout", 4), ("prompt", 1)):
        config = small_config(schedule=["constant"], latent_per=latent_per)
        rollouts = tiny.rollouts(config)
        assert len(guided_of(rollouts)) == len(rollouts) == 16
        for group in groups_of_four(rollouts):
            assert len(set(latents_of(group))) == distinct
            assert len({id(rollout.prefix) for rollout in group}) == distinct
        assert len(set(latents_of(rollouts))) == 4 * distinct  # no latent serves two prompts

    assert guided_of(tiny.rollouts(small_config(schedule=["none"]))) == []
    half = tiny.rollouts(small_config(schedule=["0:0.5"]))
    assert [rollout.guided for rollout in half] == [True, True, False, False] * 4


def test_a_share_is_rounded_anew_for_every_prompt_and_at_every_step(tiny):
    """3/8 of 4 rollouts are 1.5: one or two of them."""
    config = small_config(schedule=["0:0.375"], prompts=8)
    groups = groups_of_four(tiny.rollouts(config))
    assert {len(guided_of(group)) for group in groups} == {1, 2}

    sampler = tiny.sampler(small_config(schedule=["0:0.375"], prompts=1, steps=12))
    counts = set()
    for step in range(12):
        rollouts = plan({0: tiny.task.train[0]}, step, sampler, config)
        counts.add(len(guided_of(rollouts)))
    assert counts == {1, 2}


def test_the_schedule_is_read_at_the_share_of_steps_that_is_done(tiny):
    """rho falls from 1 to 0 over four steps: 4, 3, 2 and 1 of 4 rollouts are guided."""
    config = small_config(schedule=["linear"], steps=4)
    sampler = tiny.sampler(config)
    counts = []
    for step in range(4):
        rollouts = plan({0: tiny.task.train[0]}, step, sampler, config)
        counts.append(len(guided_of(rollouts)))
    assert counts == [4, 3, 2, 1]


PREFIX_SOURCES = [name for name in SOURCES if name != "none"]
PREFIX_SOURCES.append("math")  # a domain


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("source", PREFIX_SOURCES)
def test_prefixes_of_every_source_reach_the_rollouts(tiny, source, independent):
    config = small_config(schedule=["constant"], independent=independent)
    sampler = tiny.sampler(config, source=source)
    rollouts = collect(1, sampler, config, ALONE)
    for i, rollout in enumerate(rollouts):
        prompt_number, number = divmod(i, 4)
        prefix = sampler.palette.draw(seed_of(0, "latent", 1, prompt_number, number))
        embeddings = rollout.prefix.embeddings
        assert embeddings.shape == (3, 128)
        assert torch.equal(embeddings, prefix.embeddings)
        assert torch.equal(embeddings[0], embeddings[1]) != independent
        assert rollout.prefix.domain == prefix.domain
        if prefix.latent is None:
            assert rollout.prefix.latent is None
        else:
            assert torch.equal(rollout.prefix.latent, prefix.latent)


def one_question_task(task):
    """The same question at every step: what differs between steps is sampled anew."""
    return dataclasses.replace(task, train=task.train[:1])


def count_equal_completions(rollouts, others):
    """At equal places: a completion may be equal by chance, if it ends at once."""
    equal = 0
    for rollout, other in zip(rollouts, others):
        equal += rollout.completion_ids == other.completion_ids
    return equal


def test_every_step_samples_other_tokens(tiny):
    """Without prefixes: the seed of a token is all that can tell the steps apart."""
    config = small_config(schedule=["none"], prompts=1, group=16)
    sampler = tiny.sampler(config, task=one_question_task(tiny.task))
    one, other = [collect(step, sampler, config, ALONE) for step in (0, 1)]
    assert [r.prompt.ids for r in one] == [r.prompt.ids for r in other]
    assert count_equal_completions(one, other) <= 1
    assert count_equal_completions(one, one[1:]) <= 1  # nor do the rollouts of a group share a seed


def test_every_prompt_samples_other_tokens(tiny):
    """Asked the same question twice, a group answers otherwise the second time."""
    config = small_config(schedule=["none"], prompts=2, group=8)
    rollouts = tiny.rollouts(config, task=one_question_task(tiny.task))
    assert rollouts[0].prompt.ids == rollouts[8].prompt.ids
    assert count_equal_completions(rollouts[:8], rollouts[8:]) <= 1


def test_every_step_draws_other_latents(tiny):
    config = small_config(schedule=["constant"], prompts=1, group=16)
    sampler = tiny.sampler(config, task=one_question_task(tiny.task))
    one, other = [latents_of(collect(step, sampler, config, ALONE)) for step in (0, 1)]
    assert len(set(one)) == 16
    assert not set(one) & set(other)


def test_every_seed_asks_other_questions(tiny):
    questions = []
    for seed in (0, 1):
        rollouts = tiny.rollouts(small_config(schedule=["none"], seed=[seed]))
        questions.append({rollout.row["question"] for rollout in rollouts})
    assert questions[0] != questions[1]


def test_every_seed_samples_and_draws_anew(tiny):
    """The same question for both, so that the seed alone is another."""
    task = one_question_task(tiny.task)
    rollouts = []
    for seed in (0, 1):
        config = small_config(schedule=["0:0.5"], prompts=1, group=16, seed=[seed])
        rollouts.append(tiny.rollouts(config, step=0, task=task))
    one, other = rollouts
    assert not set(latents_of(one)) & set(latents_of(other))
    assert count_equal_completions(unguided_of(one), unguided_of(other)) <= 1


def test_rollouts_end_at_the_stop_strings_of_their_prompt_format(tiny, monkeypatch):
    config = small_config(prompt="few-shot")
    whole = tiny.rollouts(config)
    stop = f" {whole[0].text.split()[3]} "  # around the fourth of up to twelve words

    def stop_strings(tokenizer, style):
        return [stop] if style == "few-shot" else []

    monkeypatch.setattr(rewards, "stop_strings", stop_strings)
    cut = tiny.rollouts(config)
    assert [rollout.text for rollout in cut] == [r.text.partition(stop)[0] for r in whole]
    assert len(cut[0].completion_ids) == 5 < len(whole[0].completion_ids)
    assert len(cut[0].logprobs) == 5
    assert cut[0].finish == "stop"


def test_the_reward_is_the_weighted_sum_of_its_parts_and_each_is_logged(tiny, tmp_path):
    """The judge's accuracy, overlong (its buffer is 2 of 12 tokens), and a function of a file."""
    own = tmp_path / "own_rewards.py"
    own.write_text(
        "def brevity(completions, answer, **columns):\n"
        "    return [-len(text) - len(gold) / 8 for text, gold in zip(completions, answer)]\n"
    )
    config = small_config(reward=["accuracy=1", "overlong=0.5", f"{own}:brevity=0.25"])
    rollouts = tiny.rollouts(config)
    overlong_by_length = {11: -0.5, 12: -1.0}
    for rollout in rollouts:
        parts = rollout.rewards
        length = len(rollout.completion_ids)
        assert parts["overlong"] == overlong_by_length.get(length, 0.0)
        assert parts["brevity"] == -len(rollout.text) - len(rollout.row["answer"]) / 8
        expected = parts["accuracy"] + 0.5 * parts["overlong"] + 0.25 * parts["brevity"]
        assert rollout.reward == pytest.approx(expected)

    metrics = measure(rollouts, [NO_UPDATE], config, ALONE)
    for suffix, part in parts_of(rollouts).items():
        assert metrics["rollouts" + suffix] == len(part)
        for name in ("accuracy", "answered", "overlong", "brevity"):
            values = [rollout.rewards[name] for rollout in part]
            assert metrics[name + suffix] == pytest.approx(sum(values) / len(part)), name + suffix


NO_UPDATE = grpo.Update(loss=0.0, gradient_norm=0.0, sums={"tokens": torch.zeros(2)})
NO_UPDATE.sums["log_ratio"] = torch.zeros(2)


def parts_of(rollouts):
    """{suffix of a metric's name: the rollouts that it is a mean over}."""
    return {"": rollouts, "_guided": guided_of(rollouts), "_unguided": unguided_of(rollouts)}


def right_about_arithmetic(completion, row):
    """No completion of a question about lists is right; of the others about half are."""
    is_right = row["family"] == "arith" and len(completion) % 2 == 1
    return {"accuracy": float(is_right)}


def arithmetic_task():
    rows = tiny_world.load("train")[:40]
    return Task("some", rows, rows[:8], judge_function=right_about_arithmetic)


def count_silent(rollouts):
    silent = 0
    for group in groups_of_four(rollouts):
        silent += all(rollout.advantage == 0 for rollout in group)
    return silent


def test_groups_without_signal_are_replaced(tiny):
    task = arithmetic_task()
    before = tiny.rollouts(small_config(resample=0), task=task)
    after = tiny.rollouts(small_config(resample=6), task=task)
    assert count_silent(before) > 0 == count_silent(after)

    numbers = [rollout.prompt_number for rollout in after]
    assert [number % 4 for number in numbers] == [i // 4 for i in range(16)]
    assert max(numbers) < 4 * 7
    assert len({tuple(rollout.prompt.ids) for rollout in after}) == 4

    metrics = measure(before, [NO_UPDATE], small_config(), ALONE)
    assert metrics["groups_without_signal"] == count_silent(before)
    assert metrics["groups_resampled"] == 0
    metrics = measure(after, [NO_UPDATE], small_config(), ALONE)
    assert metrics["groups_without_signal"] == 0
    assert metrics["groups_resampled"] == sum(number // 4 for number in numbers[::4]) >= 3


def test_resampling_leaves_groups_with_signal_as_they_are(tiny):
    task = arithmetic_task()
    groups = groups_of_four(tiny.rollouts(small_config(resample=0), task=task))
    later_groups = groups_of_four(tiny.rollouts(small_config(resample=6), task=task))
    for group, later in zip(groups, later_groups):
        is_replaced = later[0].prompt_number >= 4
        assert is_replaced == (count_silent(group) == 1)
        if not is_replaced:
            assert count_equal_completions(group, later) == 4


def never_right(completion, row):
    return {"accuracy": 0.0}


def test_resampling_ends_after_its_rounds_with_the_last_groups(tiny):
    task = dataclasses.replace(tiny.task, judge_function=never_right)
    rollouts = tiny.rollouts(small_config(resample=2), task=task)
    assert [rollout.prompt_number for rollout in rollouts[::4]] == [8, 9, 10, 11]
    assert count_silent(rollouts) == 4


def test_resampling_is_the_same_on_one_rank_and_on_two(tiny):
    config = small_config(resample=3)
    task = arithmetic_task()

    def what_is_rolled_out(ranks):
        keys = set()
        for rollout in tiny.rollouts(config, ranks=ranks, task=task):
            ids = (*rollout.prompt.ids, *rollout.completion_ids)
            keys.add((rollout.prompt_number, rollout.guided, ids))
        return keys

    whole = what_is_rolled_out(ALONE)
    halves = [what_is_rolled_out(Ranks(rank, 2, ALONE.device)) for rank in (0, 1)]
    assert halves[0] | halves[1] == whole
    assert max(number for number, _, _ in whole) >= 4


def test_entropy_is_that_of_the_distribution_of_each_token(tiny):
    config = small_config()
    rollouts = tiny.rollouts(config)
    rollouts[0].advantage = 1.0
    one = gradient_of(tiny.model, rollouts[:1], config)
    distribution = torch.distributions.Categorical(logits=logits_of(tiny.model, rollouts[0]))
    assert one.sums["entropy"] == pytest.approx(distribution.entropy().sum().item(), rel=1e-4)


# ---- the loop ------------------------------------------------------------------------------------


@dataclass
class Training:
    """A finished run of train_policy."""

    model: torch.nn.Module
    metrics: list  # rows of metrics.jsonl, without seconds
    samples: list  # rows of samples.jsonl
    folder: Path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_training(folder, policy_folder, vae, config, ranks=ALONE, resume=False):
    model, reader = load_policy(str(policy_folder))
    reference = None
    if config.kl:
        reference = copy.deepcopy(model)
    sampler = make_sampler(model, reader, vae, first_word_task(), config)
    run = Run(folder, {}, ranks, resume=resume)
    train_policy(model, sampler, run, config, reference)

    metrics = []
    for row in read_lines(folder / "metrics.jsonl"):
        metrics.append({k: v for k, v in row.items() if not k.startswith("seconds")})
    return Training(model, metrics, read_lines(folder / "samples.jsonl"), folder)


@dataclass
class Token:
    """What the metrics say of one token, by hand."""

    guided: bool
    loss: float
    clip_share: float
    log_ratio: float
    tis_weight: float
    kl: float
    entropy: float


def token_by_hand(rollout, t, logprob, entropy, config):
    """PPO's surrogate of token t in plain numbers."""
    old = (rollout.old_logprobs or rollout.logprobs)[t]
    sampler = rollout.logprobs[t]
    r = math.exp(logprob - old)
    clipped_r = min(max(r, 1 - config.clip_low), 1 + config.clip_high)
    surrogate = r * rollout.advantage
    surrogate_clipped = clipped_r * rollout.advantage
    tis_weight = min(math.exp(old - sampler), config.tis)
    log_x = rollout.reference_logprobs[t] - logprob
    k3 = math.exp(log_x) - log_x - 1
    loss = -tis_weight * min(surrogate, surrogate_clipped) + config.kl * k3
    return Token(
        guided=rollout.guided,
        loss=rollout.weight * loss,
        clip_share=float(surrogate_clipped < surrogate),
        log_ratio=abs(logprob - sampler),
        tis_weight=tis_weight,
        kl=k3,
        entropy=entropy,
    )


@dataclass
class WatchedStep:
    """A run of one step: its metrics, and all that they are made of."""

    training: Training
    metrics: dict
    rollouts: list
    minibatches: list  # the rollouts of each update
    updates: list  # a list of Tokens for each update
    gradient_norms: list


@pytest.fixture(scope="module")
def watched_step(tmp_path_factory, policy_folder, vae):
    """One step of 2 epochs x 2 minibatches x several micro-batches, watched from outside.

    All metrics have values of their own: the sampler is made to seem another policy than pi_old, by
    a gap that differs between guided and unguided rollouts, so that the tis weights are not 1; a
    large learning rate lets tokens be clipped, and a KL to the start arise.
    """
    config = small_config(
        steps=1,
        prompts=8,
        epochs=2,
        minibatches=2,
        lr=1e-2,
        max_new_tokens=60,
        tokens_per_batch=100,
        truncated="mask",
        schedule=["0:0.5"],
        tis=1.2,
        kl=0.1,
    )
    collected = []
    minibatches = []
    updates = []
    original_collect = grpo.collect
    original_loss_of = grpo.loss_of
    original_update = grpo.update

    def collect_with_a_gap(*arguments):
        for rollout in original_collect(*arguments):
            gap = 0.3 if rollout.guided else -0.1
            rollout.logprobs = [x - gap for x in rollout.logprobs]
            collected.append(rollout)
        return collected

    def watched_update(model, optimizer, rollouts, *arguments):
        minibatches.append(rollouts)
        updates.append([])
        return original_update(model, optimizer, rollouts, *arguments)

    def watched_loss_of(rollouts, logprobs, entropy, config):
        i = 0
        for rollout in rollouts:
            for t in range(len(rollout.completion_ids)):
                logprob = logprobs[i].item()
                token = token_by_hand(rollout, t, logprob, entropy[i].item(), config)
                updates[-1].append(token)
                i += 1
        return original_loss_of(rollouts, logprobs, entropy, config)

    with pytest.MonkeyPatch.context() as patch:
        applied = watch(patch, sft, "apply_gradients")
        patch.setattr(grpo, "collect", collect_with_a_gap)
        patch.setattr(grpo, "update", watched_update)
        patch.setattr(grpo, "loss_of", watched_loss_of)
        folder = tmp_path_factory.mktemp("watched") / "run"
        training = run_training(folder, policy_folder, vae, config)
    norms = [call.result for call in applied]
    metrics = training.metrics[1]
    return WatchedStep(training, metrics, collected, minibatches, updates, norms)


def test_every_epoch_trains_on_every_rollout_once(watched_step):
    first, second, *second_epoch = watched_step.minibatches
    assert len(first) == len(second) == 16
    assert [id(rollout) for rollout in first + second] == [
        id(rollout) for rollout in watched_step.rollouts
    ]
    assert second_epoch == [first, second]


TOKEN_METRICS = ("clip_share", "log_ratio", "tis_weight", "kl", "entropy")


def mean_over(tokens, name):
    return sum(getattr(token, name) for token in tokens) / len(tokens)


@pytest.mark.parametrize("name", TOKEN_METRICS)
def test_a_metric_of_tokens_is_the_mean_over_all_updates_by_hand(watched_step, name):
    """As a whole, and of guided and unguided tokens apart; the three differ."""
    tokens = sum(watched_step.updates, [])
    guided = [token for token in tokens if token.guided]
    unguided = [token for token in tokens if not token.guided]
    assert len(watched_step.updates) == 4
    assert min(len(guided), len(unguided)) > 100

    metrics = watched_step.metrics
    for suffix, part in (("", tokens), ("_guided", guided), ("_unguided", unguided)):
        assert metrics["tokens" + suffix] == len(part)
        assert metrics[name + suffix] == pytest.approx(mean_over(part, name), rel=5e-5)
    difference = metrics[name + "_guided"] - metrics[name + "_unguided"]
    assert abs(difference) > 1e-3 * abs(metrics[name])


def test_the_metrics_of_tokens_cannot_be_taken_for_one_another(watched_step):
    """What the test above stands on: no two of them are near."""
    values = sorted(watched_step.metrics[name] for name in TOKEN_METRICS)
    for low, high in zip(values, values[1:]):
        assert high > 1.05 * low > 0, values


def test_loss_and_gradient_norm_are_means_over_the_updates_by_hand(watched_step):
    losses = []
    for tokens in watched_step.updates:
        losses.append(sum(token.loss for token in tokens))
    metrics = watched_step.metrics
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert len(watched_step.gradient_norms) == 4
    assert metrics["gradient_norm"] == pytest.approx(sum(watched_step.gradient_norms) / 4)


def test_log_ratio_start_is_that_of_the_first_update(watched_step):
    """It tells decoder and training apart: no step has moved the policy yet."""
    first = mean_over(watched_step.updates[0], "log_ratio")
    metrics = watched_step.metrics
    assert metrics["log_ratio_start"] == pytest.approx(first, rel=1e-4)
    assert metrics["log_ratio"] > 1.1 * first > 0.1


def rollout_by_hand(rollout):
    """What the metrics say of one rollout, by hand."""
    numbers = {
        "reward": rollout.reward,
        "advantage": rollout.advantage,
        "length": len(rollout.completion_ids),
        "stopped": rollout.finish == "stop",
    }
    for name in ("accuracy", "answered", "overlong"):
        numbers[name] = rollout.rewards[name]
    return numbers


def test_a_metric_of_rollouts_is_the_mean_by_hand(watched_step):
    rollouts = watched_step.rollouts
    metrics = watched_step.metrics
    assert 0 < len(cut_off_of(rollouts)) < len(rollouts) == 32
    for suffix, part in parts_of(rollouts).items():
        numbers = [rollout_by_hand(rollout) for rollout in part]
        assert metrics["rollouts" + suffix] == len(part)
        for name in numbers[0]:
            mean = sum(row[name] for row in numbers) / len(part)
            assert metrics[name + suffix] == pytest.approx(mean, abs=1e-7), name + suffix
    assert metrics["groups"] == 8
    assert metrics["groups_without_signal"] == count_silent(rollouts)


def sample_by_hand(rollout):
    sample = {
        "step": 1,
        "prompt": rollout.prompt_number,
        "prompt_ids": rollout.prompt.ids,
        "completion": rollout.text,
        **rollout.rewards,
        "reward": rollout.reward,
        "advantage": rollout.advantage,
        "finish": rollout.finish,
        "prefix": "none",
        "latent": None,
    }
    if rollout.guided:
        sample["prefix"] = "prior"
        sample["latent"] = rollout.prefix.latent.tolist()
    return sample


def test_samples_are_the_first_and_the_last_rollout_of_every_group(watched_step):
    firsts = watched_step.rollouts[0::4]
    lasts = watched_step.rollouts[3::4]
    assert len(guided_of(firsts)) == len(unguided_of(lasts)) == 8
    expected = [sample_by_hand(rollout) for rollout in firsts + lasts]
    assert watched_step.training.samples == expected


def test_the_readme_explains_every_metric(watched_step):
    text = (ROOT / "README.md").read_text()
    glossary = text.split("## What the metrics mean")[1].split("\n## ")[0]
    for row in read_lines(watched_step.training.folder / "metrics.jsonl"):
        for name in row:
            name = name.removesuffix("_unguided").removesuffix("_guided")
            assert f"`{name}`" in glossary


def test_a_new_metric_of_tokens_is_added_by_name_in_one_place(
    tmp_path, policy_folder, vae, monkeypatch
):
    """In the dictionary of policy_loss: it is logged, with its two parts, and moves no other."""
    config = small_config(steps=1, schedule=["0:0.5"])
    before = run_training(tmp_path / "before", policy_folder, vae, config).metrics[1]
    original = grpo.policy_loss
    probabilities = []

    def with_probability(logprobs, *arguments):
        loss, per_token = original(logprobs, *arguments)
        per_token["probability"] = logprobs.detach().exp()
        probabilities.extend(per_token["probability"].tolist())
        return loss, per_token

    monkeypatch.setattr(grpo, "policy_loss", with_probability)
    after = run_training(tmp_path / "after", policy_folder, vae, config).metrics[1]
    mean = sum(probabilities) / len(probabilities)
    assert after["probability"] == pytest.approx(mean)
    tokens = after["tokens_guided"] + after["tokens_unguided"]
    guided_share = after["tokens_guided"] / tokens
    of_parts = guided_share * after["probability_guided"]
    of_parts += (1 - guided_share) * after["probability_unguided"]
    assert of_parts == pytest.approx(mean)
    new = {"probability", "probability_guided", "probability_unguided"}
    assert set(after) - set(before) == new
    for name, value in before.items():
        assert after[name] == value, name


def test_rho_is_logged_as_it_was_rolled_out(tmp_path, policy_folder, vae):
    config = small_config(steps=4, schedule=["linear"])
    rows = run_training(tmp_path / "run", policy_folder, vae, config).metrics[1:]
    assert [row["rho"] for row in rows] == [1.0, 0.75, 0.5, 0.25]
    for row in rows:
        assert row["rollouts_guided"] == row["rho"] * row["rollouts"]


def test_the_kl_is_measured_from_the_start_of_the_run(tmp_path, policy_folder, vae):
    """At one update a step, a KL to the policy of the step would always be 0."""
    config = small_config(steps=3, kl=0.01, lr=3e-3)
    rows = run_training(tmp_path / "run", policy_folder, vae, config).metrics[1:]
    assert rows[0]["kl"] < 1e-8
    assert 1e-4 < rows[1]["kl"] < rows[2]["kl"]


def test_pi_old_is_the_policy_of_the_rollouts_for_every_minibatch(
    tmp_path, policy_folder, vae, monkeypatch
):
    """With --tis it comes from training's forward: also for minibatches after pi has moved."""
    updates = watch(monkeypatch, grpo, "update")
    config = small_config(steps=1, prompts=8, minibatches=4, tis=2.0, lr=1e-2)
    training = run_training(tmp_path / "run", policy_folder, vae, config)
    assert len(updates) == 4
    scored = []
    for call in updates:
        scored += [rollout for rollout in call["rollouts"] if rollout.old_logprobs]
    assert len(scored) > 16  # of 32 in four minibatches: others are silent
    for rollout in scored:
        assert rollout.old_logprobs == pytest.approx(rollout.logprobs, abs=1e-4)
    assert training.metrics[1]["clip_share"] > 0


@pytest.mark.parametrize(
    "scores, best",
    [((0.1, 0.4, 0.2, 0.3), 2), ((0.5, 0.4, 0.5, 0.3), 0), ((0.1, 0.2, 0.3, 0.4), 5)],
)
def test_evaluations_come_first_on_the_way_and_last_and_the_best_policy_is_kept(
    tmp_path, policy_folder, vae, monkeypatch, scores, best
):
    scores_left = list(scores)
    monkeypatch.setattr(evaluate, "greedy_accuracy", lambda *_: scores_left.pop(0))
    config = small_config(steps=5, eval_every=2, prompts=2, group=2, max_new_tokens=2)
    training = run_training(tmp_path / "run", policy_folder, vae, config)
    evaluations = {}
    for row in training.metrics:
        if "eval_accuracy" in row:
            evaluations[row["step"]] = row["eval_accuracy"]
    assert evaluations == dict(zip((0, 2, 4, 5), scores))
    assert read_json(training.folder / "best" / "best.json") == {"step": best, "score": max(scores)}


def test_checkpoints_come_every_so_many_steps_but_not_at_the_end(
    tmp_path, policy_folder, vae, monkeypatch
):
    saves = watch(monkeypatch, Run, "save")
    config = small_config(steps=6, save_every=2, prompts=2, group=2, max_new_tokens=2)
    run_training(tmp_path / "run", policy_folder, vae, config)
    assert [call["step"] for call in saves] == [2, 4]


def test_the_loop_learns_a_rewarded_first_word(tmp_path, policy_folder, vae):
    config = small_config(steps=20, prompts=8, lr=3e-3, eval_every=20, save_every=100)
    training = run_training(tmp_path / "run", policy_folder, vae, config)
    first, *_, last = training.metrics[1:]
    assert first["reward"] < 0.8
    assert last["reward"] > 0.95
    assert last["eval_accuracy"] > training.metrics[0]["eval_accuracy"]
    gaps = [row["log_ratio_start"] for row in training.metrics[1:] if row["tokens"] > 0]
    assert len(gaps) >= 10
    assert max(gaps) < 1e-5  # the decoder has the weights of the last update
    assert len(training.samples) == 20 * 2 * 8


# ---- exact resume --------------------------------------------------------------------------------


def resumable_config():
    return small_config(epochs=2, minibatches=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, policy_folder, vae):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return run_training(folder, policy_folder, vae, resumable_config())


@pytest.mark.parametrize(
    "owner, name, call",
    [(grpo, "collect", 1), (grpo, "collect", 4), (grpo, "update", 10), (Run, "save", 3)],
)
def test_a_killed_run_resumes_bit_for_bit(
    tmp_path, policy_folder, vae, undisturbed, monkeypatch, owner, name, call
):
    """Killed in the first step, in the last one, in an update, while it saves."""
    original = getattr(owner, name)
    calls = []

    def dying(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    folder = tmp_path / "run"
    config = resumable_config()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, dying)
        run_training(folder, policy_folder, vae, config)
    resumed = run_training(folder, policy_folder, vae, config, resume=True)

    assert [row["step"] for row in resumed.metrics] == [0, 1, 2, 3, 4]
    assert resumed.metrics == undisturbed.metrics
    assert resumed.samples == undisturbed.samples
    for key, value in undisturbed.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    best = read_json(folder / "best" / "best.json")
    assert best == read_json(undisturbed.folder / "best" / "best.json")
    accuracies = [row.get("eval_accuracy", 0) for row in resumed.metrics]
    assert best["score"] == max(accuracies)


# ---- two ranks -----------------------------------------------------------------------------------


@pytest.fixture
def no_garbage_collection():
    """A forked rank that collects garbage ends sockets and threads of its parent: seen to crash."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def fork_ranks(world, work):
    """Call work(ranks) in `world` processes that are forked from this one; all must succeed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        ranks = Ranks.start("cpu")
        work(ranks)
        ranks.close()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world


def test_two_ranks_train_like_one(tmp_path, policy_folder, vae, no_garbage_collection):
    config = small_config(
        steps=5,
        algorithm="dapo",
        tis=1.5,
        kl=0.1,
        truncated="mask",
        epochs=2,
        minibatches=2,
    )
    alone = run_training(tmp_path / "alone", policy_folder, vae, config).metrics

    def train_on_rank(ranks):
        run_training(tmp_path / "both", policy_folder, vae, config, ranks)

    fork_ranks(2, train_on_rank)
    both = read_lines(tmp_path / "both" / "metrics.jsonl")
    assert len(alone) == len(both) == 6
    assert sum(row.get("groups_resampled", 0) for row in alone) > 0
    for one, two in zip(alone, both):
        for name, value in one.items():
            expected = value
            if value is not None:
                expected = pytest.approx(value, abs=1e-5, rel=1e-5)
            assert two[name] == expected, (one["step"], name)


# ---- the job: its stages, its runs ---------------------------------------------------------------


@pytest.fixture
def world_folder(tmp_path, policy_folder, traces, monkeypatch):
    """An empty folder to run in, where the default world's base model is an untrained one."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "runs" / "tiny" / "base"
    shutil.copytree(policy_folder, base / "policy")
    lines = [json.dumps(trace) + "\n" for trace in traces]
    (base / "traces.jsonl").write_text("".join(lines))
    monkeypatch.setattr(vae_script, "draw_latents", lambda *_: None)
    return tmp_path


def no_training(model, reader, pairs, palette, run, config):
    """In place of sft.warm_up."""
    run.finish(model, reader)


def test_the_stages_are_those_that_the_scripts_alone_would_make(world_folder, monkeypatch):
    """So `python vae.py` and `python sft.py` use what `python grpo.py` has made, and vice versa:
    a stage of other settings would be refused."""
    monkeypatch.setattr(tiny_world, "make_policy", lambda *_, **__: None)
    monkeypatch.setattr(sft, "warm_up", no_training)
    policies = prepare(GRPOConfig(), ALONE)
    assert policies == {
        "none": "runs/tiny/sft-none/policy",
        "two-phase": "runs/tiny/sft/policy",
        "linear": "runs/tiny/sft/policy",
    }

    monkeypatch.setattr(vae_script, "train_vae", fail)
    monkeypatch.setattr(sft, "warm_up", fail)
    vae_script.main([])
    sft.main([])
    sft.main(["--source", "none"])
    assert prepare(GRPOConfig(), ALONE) == policies
    assert read_json("runs/tiny/sft/config.json")["source"] == "posterior"
    assert read_json("runs/tiny/sft-none/config.json")["source"] == "none"


def test_rank_0_makes_base_and_vae_and_all_ranks_warm_up(world_folder, monkeypatch):
    monkeypatch.setattr(Ranks, "wait", lambda ranks: None)
    made = watch(monkeypatch, tiny_world, "make_policy")
    monkeypatch.setattr(tiny_world, "make_base", lambda config: None)
    vaes = watch(monkeypatch, vae_script, "train")
    warm_ups = watch(monkeypatch, sft, "train")
    monkeypatch.setattr(sft, "warm_up", no_training)
    config = GRPOConfig(base_seed=3, base_steps=5, schedule=["none", "linear", "two-phase"])
    policies = prepare(config, ALONE)
    assert prepare(config, Ranks(1, 2, ALONE.device)) == policies
    assert [(call["folder"], call["seed"], call["steps"]) for call in made] == [
        ("runs/tiny/base", 3, 5)
    ]
    assert len(vaes) == 1
    assert [call["config"].source for call in warm_ups] == ["none", "posterior"] * 2


def test_the_paper_s_warm_up_and_what_starts_from_it_lie_beside_the_default_one(
    world_folder, monkeypatch
):
    monkeypatch.setattr(tiny_world, "make_policy", lambda *_, **__: None)
    monkeypatch.setattr(sft, "warm_up", no_training)
    config = GRPOConfig(warm_up="prior", schedule=["none", "linear"])
    policies = prepare(config, ALONE)
    assert policies == {"none": "runs/tiny/sft-none/policy", "linear": "runs/tiny/sft-prior/policy"}
    kept = read_json("runs/tiny/sft-prior/config.json")
    assert (kept["source"], kept["steps"], kept["lr"], kept["lengths"]) == ("prior", 10, 3e-6, [1])
    names = [run_plan.folder.name for run_plan in run_plans(config)]
    assert names == ["grpo-none-s0", "grpo-linear-from-prior-s0"]
    sft.main(["--source", "prior"])  # the same stage, finished
    Path("other").mkdir()
    Path("other/base").symlink_to(Path("runs/tiny/base").resolve())
    changed = dataclasses.replace(
        config, out="other", sft_lr=1e-3, sft_steps=3, vae="runs/tiny/vae"
    )
    prepare(dataclasses.replace(changed, traces=["runs/tiny/base/traces.jsonl"]), ALONE)
    for folder in ("sft-none", "sft-prior"):
        kept = read_json(f"other/{folder}/config.json")
        assert (kept["steps"], kept["lr"]) == (3, 1e-3)
    with pytest.raises(ValueError, match="--warm-up must be one of prior, posterior, not 'gauss'"):
        GRPOConfig(warm_up="gauss")


def test_a_vae_that_is_named_is_used_as_it_is(world_folder, vae, monkeypatch):
    vae.save(world_folder / "mine")
    before = (world_folder / "mine" / "config.json").read_text()
    monkeypatch.setattr(tiny_world, "make_policy", lambda *_, **__: None)
    monkeypatch.setattr(vae_script, "train", fail)
    monkeypatch.setattr(sft, "warm_up", no_training)
    prepare(GRPOConfig(vae="mine", schedule=["linear"]), ALONE)
    assert read_json("runs/tiny/sft/config.json")["vae"] == "mine"
    assert (world_folder / "mine" / "config.json").read_text() == before


@pytest.mark.parametrize("prompt, of_warm_up", [("chat", "chat"), ("few-shot", "plain")])
def test_the_warm_up_has_the_prompt_format_of_rl_but_no_examples(
    world_folder, monkeypatch, prompt, of_warm_up
):
    monkeypatch.setattr(tiny_world, "make_policy", lambda *_, **__: None)
    monkeypatch.setattr(sft, "warm_up", no_training)
    prepare(GRPOConfig(prompt=prompt, schedule=["none"]), ALONE)
    assert read_json("runs/tiny/sft-none/config.json")["prompt"] == of_warm_up


@pytest.mark.parametrize(
    "folder, content, script",
    [
        ("base", {"lr": 1}, "tiny_world.py"),
        ("vae", {"settings": {"lr": 1}}, "vae.py"),
        ("sft-none", {"lr": 1}, "sft.py"),
    ],
)
def test_a_stage_of_other_settings_is_refused_with_the_command_that_replaces_it(
    world_folder, monkeypatch, folder, content, script
):
    if folder != "base":
        monkeypatch.setattr(tiny_world, "make_policy", lambda *_, **__: None)
    path = world_folder / "runs" / "tiny" / folder / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as problem:
        prepare(GRPOConfig(schedule=["none"]), ALONE)
    message = str(problem.value)
    assert f"runs/tiny/{folder} holds a" in message
    assert "lr" in message
    assert f"{script} ... --overwrite" in message


def test_the_warm_ups_of_a_job_share_no_settings_whatever_their_order(tmp_path, vae):
    vae.save(tmp_path / "vae")
    config = GRPOConfig(out=str(tmp_path), schedule=["two-phase", "none"])
    guided = grpo.warm_up_settings(config, config.warm_up)
    plain = grpo.warm_up_settings(config, "none")
    assert guided["lengths"] == [4, 8]
    for settings in (guided, plain):
        sft.SFTConfig(model="any", traces=["any.jsonl"], out="any", **settings)
    assert plain["source"] == "none" and plain["steps"] == 10


def test_runs_are_named_and_start_from_the_warm_up_of_their_kind(tmp_path, monkeypatch):
    def policies_of(config, ranks):
        policies = {}
        for schedule in config.schedule:
            policies[schedule] = "plain" if schedule == "none" else "prefixed"
        return policies

    started = {}

    def start_run(plan, run, task, rewards, start, config, traces):
        assert traces == []  # noise has no control to speak of
        started[run.folder.name] = (start, plan.schedule, plan.seed)

    reported = []
    monkeypatch.setattr(grpo, "prepare", policies_of)
    monkeypatch.setattr(grpo, "check_model", lambda *arguments: None)
    monkeypatch.setattr(grpo, "train_run", start_run)
    monkeypatch.setattr(grpo, "report", lambda *arguments: reported.append(arguments))
    schedules = ["none", "linear", "0:0", "0:1,0.5:0"]
    config = GRPOConfig(schedule=schedules, source="noise", seed=[0, 3], out=str(tmp_path))
    train(config)

    assert len(started) == 8
    assert started["grpo-none-s3"] == ("plain", "none", 3)
    assert started["grpo-linear-noise-s3"] == ("prefixed", "linear", 3)
    assert started["grpo-rho0=0-noise-s3"] == ("prefixed", "0:0", 3)
    assert started["grpo-rho0=1_0.5=0-noise-s3"] == ("prefixed", "0:1,0.5:0", 3)
    _, _, folders, _ = reported[0]
    assert list(folders) == schedules
    assert folders["none"] == [tmp_path / "grpo-none-s0", tmp_path / "grpo-none-s3"]


@dataclass
class StartedRun:
    """What train_run hands to train_policy."""

    model: torch.nn.Module
    sampler: Sampler
    run: Run
    reference: torch.nn.Module | None


def start_run(monkeypatch, policy_folder, vae, folder, schedule="linear", **changes):
    """train_run up to its loop."""
    calls = []
    monkeypatch.setattr(grpo, "train_policy", lambda *arguments: calls.append(arguments))
    vae.save(folder / "vae")
    config = small_config(schedule=[schedule], vae=str(folder / "vae"), **changes)
    plan = RunPlan(schedule, seed=7, folder=folder / "run", settings={})
    run = Run(plan.folder, plan.settings, ALONE)
    task = first_word_task()
    rewards = load_rewards(config.reward, task)
    train_run(plan, run, task, rewards, str(policy_folder), config)
    model, sampler, run, _, reference = calls[0]
    return StartedRun(model, sampler, run, reference)


def test_the_settings_of_sampling_reach_a_run(monkeypatch, policy_folder, vae, tmp_path):
    settings = {"source": "math", "length": 5, "independent": True, "slots": 9}
    settings["rollout_precision"] = "bf16"
    started = start_run(monkeypatch, policy_folder, vae, tmp_path, **settings)
    palette = started.sampler.palette
    assert (palette.source, palette.length, palette.tiled) == ("math", 5, False)
    decoder = started.sampler.decoder
    assert decoder.model is started.model
    assert decoder.dtype == torch.bfloat16
    assert decoder.max_slots == 9
    assert decoder.eos_ids == end_ids(started.model, started.sampler.reader.tokenizer)
    assert started.sampler.schedule == [(0.0, 1.0), (1.0, 0.0)]
    assert started.sampler.seed == 7
    assert started.reference is None
    assert all(p.requires_grad for p in started.model.parameters())


def test_a_run_without_prefixes_needs_no_vae(monkeypatch, policy_folder, vae, tmp_path):
    monkeypatch.setattr(vae_script.VAE, "load", fail)
    started = start_run(monkeypatch, policy_folder, vae, tmp_path, schedule="none")
    assert started.sampler.palette.source == "none"
    assert started.sampler.palette.length == 0


def test_the_reference_is_a_frozen_copy_of_the_start(monkeypatch, policy_folder, vae, tmp_path):
    started = start_run(monkeypatch, policy_folder, vae, tmp_path, kl=0.1)
    start, _ = load_policy(str(policy_folder))
    for name, p in start.named_parameters():
        reference = started.reference.get_parameter(name)
        assert torch.equal(reference, p)
        assert not reference.requires_grad
        assert reference is not started.model.get_parameter(name)


def test_domains_are_asked_of_the_vae_as_soon_as_there_is_one(tmp_path, vae, monkeypatch):
    """The VAE names the domains; without one --traces does; where the rows do, the VAE that is
    trained on them, before the first run and not after the last."""
    vae.save(tmp_path / "vae")
    monkeypatch.setattr(grpo, "train_run", fail)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "", "answer": "so", "domain": "math"}')
    common = {"schedule": ["linear"], "out": str(tmp_path / "out")}

    named = GRPOConfig(
        traces=[f"poetry={rows}"], vae=str(tmp_path / "vae"), source="poetry", **common
    )
    by_traces = GRPOConfig(traces=[f"math={rows}"], source="poetry", **common)
    by_world = GRPOConfig(source="poetry", **common)
    monkeypatch.setattr(grpo, "prepare", fail)
    for config in (named, by_traces, by_world):
        with pytest.raises(ValueError, match="unknown prefix source 'poetry'.*math"):
            train(config)

    by_rows = GRPOConfig(traces=[str(rows)], source="poetry", **common)

    def prepare(config, ranks):
        vae.save(tmp_path / "out" / "vae")
        return {"linear": "policy"}

    monkeypatch.setattr(grpo, "prepare", prepare)
    with pytest.raises(ValueError, match="unknown prefix source 'poetry'.*math"):
        train(by_rows)


# What may differ when a run is resumed: where it runs and in which pieces, what it starts from
# (its folders have settings of their own), and the table at the end.
MAY_CHANGE = {
    "out",
    "device",
    "fsdp",
    "checkpointing",
    "tokens_per_batch",
    "save_every",
    "resume",
    "overwrite",
    "slots",
    "closing_questions",
    "vae",
    "traces",
    "limit",
    "warm_up",
    "sft_lr",
    "sft_steps",
    "base_seed",
    "base_steps",
}


def test_what_changes_a_run_is_among_its_settings(tmp_path):
    """So it cannot differ when the run is resumed; what is not, may."""
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    config = GRPOConfig(schedule=["none", "linear"], seed=[0, 5], out=str(tmp_path))
    plans = run_plans(config)
    pairs = [("none", 0), ("none", 5), ("linear", 0), ("linear", 5)]
    assert [(run_plan.schedule, run_plan.seed) for run_plan in plans] == pairs
    for run_plan in plans:
        settings = run_plan.settings
        assert set(settings) == names - MAY_CHANGE
        assert settings["schedule"] == run_plan.schedule
        assert settings["seed"] == run_plan.seed
        assert None not in [settings[name] for name in GRPO]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 1e-5}, "another lr"),
        ({"steps": 5}, "another steps"),
        ({"reward": ["format=1"]}, "another reward"),
        ({"algorithm": "dapo"}, None),  # a folder of its own
        ({"slots": 3}, "unfinished"),
    ],
)
def test_a_run_of_other_settings_is_refused_before_the_first_run_of_several(
    tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(grpo, "prepare", fail)
    common = {"schedule": ["none", "linear"], "seed": [0, 1], "out": str(tmp_path)}
    last = run_plans(GRPOConfig(**common))[-1]
    Run(last.folder, last.settings, ALONE)
    task = first_word_task()
    config = GRPOConfig(**common, **changes)
    if message is None:
        check(config, task, ALONE)
    else:
        with pytest.raises(ValueError, match=f"grpo-linear-s1 holds an?.*{message}"):
            check(config, task, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["grpo-linear-s1"]


OWN_WORLD = '''
"""The tiny world, but its base model is not trained at all."""
import json
from pathlib import Path

import tiny_world
from tiny_world import DOMAINS, answer, judge, make_reader, style

DEFAULTS = {"steps": 2, "lr": 1e-3, "max_new_tokens": 6, "eval_questions": 4}


def load(split, seed=0):
    return tiny_world.load(split)[:16]


def make_policy(folder, seed=0, steps=None):
    tiny_world.make_model(seed).save_pretrained(f"{folder}/policy")
    make_reader().save(f"{folder}/policy")
    lines = [json.dumps(trace) + "\\n" for trace in tiny_world.make_traces(60, seed=0)]
    Path(folder, "traces.jsonl").write_text("".join(lines))


def finish(folder):
    return f"the world finishes {folder}"
'''


def test_a_job_runs_from_python_and_is_found_done(tmp_path, monkeypatch, capsys):
    """From a world's file to the tables: `from grpo import GRPOConfig, train`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vae_script, "draw_latents", lambda *_: None)
    Path("own_world.py").write_text(OWN_WORLD)
    config = GRPOConfig(
        model="own_world.py",
        schedule=["none", "constant"],
        seed=[0, 1],
        prompts=2,
        group=2,
        closing_questions=1,
    )
    figures = train(config)

    root = Path("runs/own_world")
    guided = {"none-s0": 0, "none-s1": 0, "constant-s0": 4, "constant-s1": 4}
    for name, count in guided.items():
        metrics = read_lines(root / f"grpo-{name}" / "metrics.jsonl")
        assert [row["step"] for row in metrics] == [0, 1, 2]
        assert metrics[1]["rollouts_guided"] == count
        load_policy(str(root / f"grpo-{name}"))
    assert list(figures) == ["none", "constant"]
    assert len(figures["constant"]["end"]) == 2
    assert read_json(root / "grpo-prior.json") == figures
    assert "grpo-prior constant" in (root / "grpo-prior.md").read_text()
    arms = read_json(root / "evaluation" / "config.json")
    assert arms["model"] == "runs/own_world/sft/policy"  # the start that has seen prefixes
    assert arms["questions"] == 1
    assert capsys.readouterr().out.endswith("the world finishes runs/own_world\n")

    monkeypatch.setattr(vae_script, "train_vae", fail)
    monkeypatch.setattr(sft, "warm_up", fail)
    monkeypatch.setattr(grpo, "train_policy", fail)
    assert train(dataclasses.replace(config, closing_questions=0)) == figures
    assert "the world finishes" not in capsys.readouterr().out


# ---- settings and the command line ---------------------------------------------------------------


def parse(*argv):
    return parse_settings(GRPOConfig, grpo.__doc__, list(argv))


def test_an_algorithm_sets_defaults_which_flags_override():
    dapo = parse("--algorithm", "dapo", "--clip-high", "0.3", "--resample", "0")
    assert dapo.mean_over == "token"
    assert dapo.clip_low == 0.2
    assert dapo.clip_high == 0.3
    assert dapo.resample == 0
    assert parse("--algorithm", "gspo", "--ratio", "token").ratio == "token"
    assert parse("--algorithm", "grpo", "--model", "tiny") == parse() == GRPOConfig()


def test_a_world_and_a_real_model_have_defaults_of_their_own():
    tiny = GRPOConfig()
    assert (tiny.task, tiny.out, tiny.lr, tiny.steps) == ("tiny", "runs/tiny", 4e-4, 60)
    assert (tiny.max_new_tokens, tiny.tokens_per_batch, tiny.save_every) == (34, 1024, 20)
    assert tiny.schedule == ["none", "two-phase", "linear"]
    scenes = GRPOConfig(model="tiny-vl")
    assert (scenes.task, scenes.out, scenes.max_new_tokens) == ("tiny-vl", "runs/tiny-vl", 14)
    real = parse("--model", "some/model", "--task", "gsm8k", "--traces", "t.jsonl", "--steps", "7")
    assert (real.lr, real.steps, real.out) == (1e-6, 7, "runs/real")
    assert real.schedule == ["two-phase"]


def test_a_preset_that_is_added_as_one_dict_is_an_algorithm(monkeypatch):
    preset = {**GRPO, "advantage": "mean", "ratio": "sequence", "clip_high": 0.5}
    monkeypatch.setitem(ALGORITHMS, "mine", preset)
    config = parse("--algorithm", "mine", "--schedule", "linear")
    for name, value in preset.items():
        assert getattr(config, name) == value
    assert run_plans(config)[0].folder.name == "mine-linear-s0"


@pytest.mark.parametrize(
    "name, choices",
    [
        ("ratio", "token or sequence"),
        ("advantage", "mean-std, mean or leave-one-out"),
        ("mean_over", "sequence, token or constant"),
    ],
)
def test_a_preset_with_a_name_that_the_formulas_do_not_know_is_refused(monkeypatch, name, choices):
    monkeypatch.setitem(ALGORITHMS, "mine", {**GRPO, name: "typo"})
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{flag} 'typo' is unknown: choose {choices}$"):
        GRPOConfig(algorithm="mine")


def test_a_preset_of_a_setting_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "mine", {**GRPO, "clip_hihg": 0.3})
    with pytest.raises(ValueError, match="clip_hihg"):
        GRPOConfig(algorithm="mine")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
        (["--truncated", "maybe"], "invalid choice: 'maybe'"),
        (["--keep", "5"], "unrecognized arguments: --keep 5"),
        (["--lr-schedule", "linear"], "unrecognized arguments: --lr-schedule linear"),
    ],
)
def test_flags_that_cannot_be_read_end_with_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


BAD_SETTINGS = [
    ({"group": 1}, "--group must be at least 2, not 1"),
    ({"length": -1}, "--length must be at least 0, not -1"),
    ({"steps": 0}, "--steps must be at least 1, not 0"),
    ({"prompts": 0}, "--prompts must be at least 1, not 0"),
    ({"epochs": 0}, "--epochs must be at least 1, not 0"),
    ({"resample": -1}, "--resample must be at least 0, not -1"),
    ({"clip_low": math.nan}, "--clip-low must be at least 0, not nan"),
    ({"lr": math.nan}, "--lr must be at least 0, not nan"),
    ({"kl": math.inf}, "--kl must be at least 0 and finite, not inf"),
    ({"temperature": math.nan}, "--temperature must be at least 0, not nan"),
    ({"temperature": 0.0}, "--temperature must be above 0"),
    ({"top_p": 0.0}, "0 < top_p <= 1"),
    ({"tis": 0.5}, "--tis must be 0 (off) or at least 1"),
    ({"algorithm": "ppo"}, "'ppo' is unknown: choose from grpo, rloo"),
    ({"truncated": "masked"}, "--truncated"),
    ({"latent_per": "rollouts"}, "--latent-per"),
    ({"rollout_precision": "fp16"}, "--rollout-precision"),
    ({"prompt": "chatty"}, "--prompt"),
    ({"schedule": ["zigzag"]}, "--schedule 'zigzag' is none of none, constant"),
    ({"schedule": ["0:1,0.5"]}, "--schedule '0:1,0.5' is none of"),
    ({"schedule": ["0:2"]}, "between 0 and 1"),
    ({"schedule": ["0:nan"]}, "between 0 and 1"),
    ({"schedule": ["0.5:1,0:0"]}, "of rising tau"),
    ({"schedule": ["none", "none"]}, "--schedule names a run twice"),
    ({"seed": [1, 2, 1]}, "--seed names a run twice"),
    ({"length": 0}, "injects nothing"),
    ({"source": "none", "schedule": ["none", "linear"]}, "injects nothing"),
    ({"model": "some/model", "task": "gsm8k"}, "--traces is needed"),
    ({"model": "some/model", "traces": ["t.jsonl"]}, "--task is needed"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS)
def test_bad_settings_are_refused_in_one_sentence_when_the_config_is_made(settings, message):
    with pytest.raises(ValueError) as problem:
        GRPOConfig(**settings)
    assert message in str(problem.value)
    assert "\n" not in str(problem.value)


def test_bad_settings_are_also_refused_of_a_copy():
    with pytest.raises(ValueError, match="--group must be at least 2"):
        dataclasses.replace(GRPOConfig(), group=1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--group", "1"], "--group must be at least 2, not 1"),
        (["--source", "poetry"], "unknown prefix source 'poetry'"),
        (["--reward", "beauty=1"], "unknown reward 'beauty'"),
        (["--reward", "accuracy=much"], "NAME=WEIGHT"),
        (["--reward", "accuracy=nan"], "NAME=WEIGHT"),
        (["--reward", "accuracy=0"], "a weight that is not 0"),
        (["--reward", "format=1", "format=2"], "each name once"),
        (["--prompts", "3", "--minibatches", "2"], "split over 1 ranks x 2 minibatches"),
        (["--traces", "math=nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["--task", "mine", "--train-data", "nowhere.jsonl"], "no test rows"),
        (["--task", "tiny-vl"], "text only"),
        (["--model", "/nowhere", "--task", "tiny", "--traces", "hub:t"], "/nowhere"),
    ],
)
def test_bad_input_ends_before_any_work_with_status_1_and_one_line(
    tmp_path, monkeypatch, capsys, argv, message
):
    monkeypatch.setattr(grpo, "prepare", fail)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: grpo.main([*argv, "--out", str(out)]), "grpo.py")
    line = str(stop.value.code)  # sys.exit prints it to stderr, with status 1
    assert line.startswith("grpo.py: ")
    assert message in line
    assert "\n" not in line
    assert not out.exists()


def test_the_script_itself_ends_with_status_1_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "grpo.py"), "--temperature", "0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("grpo.py: --temperature must be above 0")
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_for_which_the_model_has_no_positions_is_refused(policy_folder, tmp_path):
    config = GRPOConfig(
        model=str(policy_folder),
        task="tiny",
        traces=["hub:t"],
        out=str(tmp_path / "out"),
        length=200,
        max_new_tokens=50,
    )
    with pytest.raises(ValueError, match="more than the 256 positions of this model"):
        check(config, load_task("tiny"), ALONE)


def test_a_world_whose_model_has_too_few_positions_is_refused_before_the_first_run(
    policy_folder, tmp_path, monkeypatch
):
    """Its model may have to be made first: then it can be asked."""
    monkeypatch.setattr(grpo, "prepare", lambda *_: {"linear": str(policy_folder)})
    monkeypatch.setattr(grpo, "train_run", fail)
    config = GRPOConfig(schedule=["linear"], length=250, out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="more than the 256 positions of this model"):
        train(config)
    assert not (tmp_path / "out").exists()
