"""GRPO with latent injection (Sec. 3.4, Eq. 12-14): part of every group reasons under a prefix.

One step of `train_policy`, each verb a function below:
    plan      for each prompt, for each of its G rollouts: guided or not (Eq. 12), prefix, seeds
    generate  the batched decoder writes the completions
    judge     the task and the reward functions say what each completion earns
    compare   advantages: each rollout against its own group (Eq. 13)
    weigh     what a token counts in the loss, as a share of a count over all ranks
    update    micro-batches through policy_loss (Eq. 14), backward, one optimizer step
    measure   metrics by name, of guided and unguided rollouts apart

Departs from the GRPO paper, or chooses what Reasoning Palette leaves open:
  1. Guided and unguided rollouts share one group baseline (Eq. 12, 13). rho * G is rounded at
     random, right on average. Every guided rollout draws its own z (the paper: one per prompt,
     --latent-per prompt): a group of one strategy has nothing to compare.
  2. The loss scores each rollout under the same prefix, temperature and filters that it was
     sampled with (Eq. 14). pi_old is what the decoder sampled from, not a second forward
     (the metric log_ratio_start tells how far the two differ; --tis corrects it).
  3. The KL term to a reference is off by default, and then no reference model is held.
  4. Everything random is a pure function of (seed, step, prompt, rollout): a resumed run needs no
     generator state, and N ranks sample what one rank would.

Run it (the first command builds all that is missing: base model, VAE, warm-up):
    python grpo.py                               # the tiny world: three schedules, tables
    python grpo.py --model tiny-vl               # a vision-language model on drawn scenes
    python grpo.py --algorithm gspo --schedule two-phase 0:0,0.3:1,0.3:0     # tau:rho points
    python grpo.py --task my_task.py --reward accuracy=1 my_rewards.py:brevity=0.2
    python grpo.py --model Qwen/Qwen3-0.6B --task gsm8k --out runs/qwen --traces math=... code=...
    torchrun --nproc_per_node=4 grpo.py --model ...      # each GPU rolls out its own prompts
From Python: `from grpo import GRPOConfig, train`, then `train(GRPOConfig(steps=20))`.
"""

import contextlib
import json
import math
import random
import statistics
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import evaluate
import sft
import vae
from prefix import (
    PRECISIONS,
    SOURCES,
    Decoder,
    Palette,
    Prefix,
    Prompt,
    Sampling,
    check_prompts,
    check_source,
    complete,
    completion_logprobs,
    end_ids,
    micro_batches,
    needs_vae,
    prompt_of,
    unshard,
)
from rewards import (
    DEFAULT_WORLD,
    PROMPT_STYLES,
    Reward,
    Task,
    find_model,
    load_rewards,
    load_task,
    score_rewards,
    weighted_sum,
    world_defaults,
    world_domains,
    world_of,
    world_root,
)
from sft import Ranks, Run, seed_of
from vae import require_at_least

# ---- settings ------------------------------------------------------------------------------------

# What tells the algorithms apart: the defaults of six settings, which advantages, token_weight,
# policy_loss and collect read. In a first update, where every ratio is 1, the gradient of gspo is
# that of grpo, and dr-grpo's is rloo's times (G - 1) / G. RLOO's paper sums over tokens; ours
# divides the sum by a constant. DAPO's also has --reward accuracy=1 overlong=1.
GRPO = {
    "advantage": "mean-std",
    "mean_over": "sequence",
    "ratio": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "resample": 0,
}
ALGORITHMS = {
    "grpo": GRPO,  # arXiv 2402.03300
    "rloo": {**GRPO, "advantage": "leave-one-out", "mean_over": "constant"},  # 2402.14740
    "dr-grpo": {**GRPO, "advantage": "mean", "mean_over": "constant"},  # 2503.20783
    "dapo": {**GRPO, "mean_over": "token", "clip_high": 0.28, "resample": 2},  # 2503.14476
    "gspo": {**GRPO, "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},  # 2507.18071
}

# rho(tau) as points tau:rho, linear between them, level beyond; at a repeated tau it jumps, to the
# later point's rho. The paper's are two-phase and linear.
SCHEDULES = {"none": "0:0", "constant": "0:1", "two-phase": "0:1,0.5:1,0.5:0", "linear": "0:1,1:0"}

# The defaults of a real model; a world's file has its own (DEFAULTS there).
REAL_MODEL = {
    "out": "runs/real",
    "schedule": ["two-phase"],
    "steps": 200,
    "lr": 1e-6,
    "warm_up": "prior",
    "max_new_tokens": 512,
    "eval_questions": 128,
    "closing_questions": 16,
    "tokens_per_batch": 8192,
    "save_every": 20,
}


@dataclass
class GRPOConfig(sft.TrainingConfig):
    """The settings of a job: one RL run for each schedule and seed.

    A field that is None is filled in: by the algorithm's preset, by the world's DEFAULTS, or by
    REAL_MODEL. Raises ValueError, in one sentence, for settings that cannot work together.
    """

    # Model and data.
    model: str = HfArg(default=DEFAULT_WORLD, help="hub name, folder, a world's name or its file")
    task: str | None = HfArg(
        default=None, help="gsm8k, math, a task file, ... (default: the world)"
    )
    train_data: str | None = HfArg(default=None, help="JSONL or hub:DATASET (default: the task's)")
    test_data: str | None = HfArg(default=None, help="of the evaluations (default: the task's)")
    prompt: Literal[PROMPT_STYLES] = HfArg(default="auto", help="prompt format")
    out: str | None = HfArg(default=None, help="folder of all stages", compare=False)

    # Injection (Eq. 9, 12).
    schedule: list[str] | None = HfArg(
        default=None,
        help=f"one run each: {', '.join(SCHEDULES)}, or points tau:rho as in 0:1,0.5:1,0.5:0,1:0 "
        "with a jump at 0.5 (default: the world's, or two-phase)",
    )
    source: str = HfArg(default="prior", help=f"{', '.join(SOURCES)}, or a domain of the VAE")
    length: int = HfArg(default=8, help="prefix rows L")
    independent: bool = HfArg(default=False, help="L independent latents instead of one tiled")
    latent_per: Literal["rollout", "prompt"] = HfArg(default="rollout", help="one z each")

    # Reward and loss (Eq. 13, 14). The algorithm is a preset of the six settings behind it.
    reward: list[str] = HfArg(
        default_factory=lambda: ["accuracy=1"],
        help="NAME=WEIGHT or FILE.py:FUNCTION=WEIGHT; the reward is their weighted sum",
    )
    truncated: Literal["keep", "mask", "penalise"] = HfArg(
        default="keep", help="cut-off completions: train on them, not on them, or take 1 off"
    )
    algorithm: str = HfArg(default="grpo", help=f"one of {', '.join(ALGORITHMS)}")
    advantage: str | None = HfArg(default=None, help="mean-std, mean or leave-one-out")
    mean_over: str | None = HfArg(default=None, help="of the loss: sequence, token or constant")
    ratio: str | None = HfArg(default=None, help="importance ratio of each token or sequence")
    clip_low: float | None = HfArg(default=None, help="PPO clip below 1")
    clip_high: float | None = HfArg(default=None, help="PPO clip above 1")
    resample: int | None = HfArg(default=None, help="fresh prompts tried for one without signal")
    tis: float = HfArg(default=0.0, help="cap of pi_old / pi_sampler, a token's weight; 0: off")
    kl: float = HfArg(default=0.0, help="weight of the KL to the starting policy; 0: none is held")

    # Training.
    steps: int | None = HfArg(default=None, help="batches of rollouts (default: the world's, 200)")
    prompts: int = HfArg(default=8, help="prompts per step, over all ranks")
    group: int = HfArg(default=8, help="rollouts per prompt G, which are compared")
    epochs: int = HfArg(default=1, help="passes over each batch of rollouts")
    minibatches: int = HfArg(default=1, help="updates per pass")
    lr: float | None = HfArg(default=None, help="AdamW's (default: the world's, or 1e-6)")
    seed: list[int] = HfArg(default_factory=lambda: [0], help="RL seeds, one run each")

    # Sampling of rollouts.
    temperature: float = HfArg(default=1.0, help="of rollouts")
    top_p: float = HfArg(default=1.0, help="likeliest tokens kept, by their sum; 1: all")
    top_k: int = HfArg(default=0, help="likeliest tokens kept, by number; 0: all")
    max_new_tokens: int | None = HfArg(default=None, help="(default: the world's, or 512)")
    slots: int = HfArg(default=64, help="rows decoded at a time", compare=False)
    rollout_precision: Literal["fp32", "bf16"] = HfArg(
        default="fp32", help="bf16 halves the decoder's memory; a slightly other policy: --tis"
    )

    # Evaluation without prefix on the way; the arms of the table at the end (0: no such table).
    eval_every: int = HfArg(default=10, help="steps between greedy evaluations")
    eval_questions: int | None = HfArg(default=None, help="(default: the world's, or 128)")
    closing_questions: int | None = HfArg(default=None, help="of the last table", compare=False)

    # Stages before RL, with a config.json of their own; the defaults are the world's, if it is one.
    vae: str | None = HfArg(default=None, help="VAE folder (default: OUT/vae)", compare=False)
    traces: list[str] | None = HfArg(default=None, help="[DOMAIN=]SOURCE ...", compare=False)
    limit: int = HfArg(default=2000, help="traces kept per source of your own", compare=False)
    warm_up: Literal["prior", "posterior"] | None = HfArg(
        default=None,
        help="its prefixes: posterior (from the trace's own latent), or prior, as in the paper "
        "(default: the world's, or prior)",
        compare=False,
    )
    sft_lr: float | None = HfArg(
        default=None, help="of the warm-up (default: as in sft.py)", compare=False
    )
    sft_steps: int | None = HfArg(
        default=None, help="of the warm-up (default: as in sft.py)", compare=False
    )
    base_seed: int = HfArg(default=0, help="seed of a world's base model", compare=False)
    base_steps: int | None = HfArg(default=None, help="its pretraining steps", compare=False)

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            names = ", ".join(ALGORITHMS)
            raise ValueError(f"--algorithm '{self.algorithm}' is unknown: choose from {names}")
        self.fill_in_defaults()
        if isinstance(self.schedule, str):
            self.schedule = [self.schedule]
        super().__post_init__()
        require_at_least(self, group=2, steps=1, prompts=1, epochs=1, minibatches=1)
        require_at_least(self, max_new_tokens=1, slots=1, eval_every=1, eval_questions=1)
        require_at_least(self, limit=1, base_steps=1, sft_steps=1)
        require_at_least(self, length=0, clip_low=0, clip_high=0, resample=0, tis=0, kl=0, lr=0)
        require_at_least(self, sft_lr=0, temperature=0, closing_questions=0)
        self.check_combinations()

    def fill_in_defaults(self):
        """Give every None field its value, where there is one."""
        names = [field.name for field in fields(self)]
        preset = ALGORITHMS[self.algorithm]
        for name in preset:
            if name not in names:
                raise ValueError(f"preset '{self.algorithm}': '{name}' is no setting of GRPOConfig")

        defaults = {**REAL_MODEL, **world_defaults(self.model), **preset}
        if world_of(self.model):
            defaults.setdefault("task", self.model)
            defaults["out"] = world_root(self.model)
        for name, value in defaults.items():
            if name in names and getattr(self, name) is None:
                setattr(self, name, value)

    def check_combinations(self):
        """ValueError for settings that together would fail after an hour, or train on nothing."""
        if self.task is None:
            raise ValueError("--task is needed for a model of your own, e.g. --task gsm8k")
        if not self.traces and not world_of(self.model):
            raise ValueError("--traces is needed for a model of your own: math=traces.jsonl, ...")
        if self.temperature == 0:
            raise ValueError("--temperature must be above 0: greedy rollouts are all the same")
        if 0 < self.tis < 1:
            raise ValueError(f"--tis must be 0 (off) or at least 1, not {self.tis}")
        injects_nothing = self.source == "none" or self.length == 0
        if injects_nothing and self.schedule != ["none"]:
            raise ValueError("--source none or --length 0 injects nothing: use --schedule none")
        for flag, values in (("schedule", self.schedule), ("seed", self.seed)):
            if len(set(values)) < len(values):
                raise ValueError(f"--{flag} names a run twice")
        for schedule in self.schedule:
            points_of(schedule)
        sampling_of(self)
        # The formulas once on nothing: a name that they do not know speaks at once.
        advantages(torch.zeros(1, 2), self.advantage)
        token_weight(self.mean_over, 1, 1, 1, self.max_new_tokens)
        loss_of([], torch.zeros(0), torch.zeros(0), self)


def sampling_of(config):
    """How rollouts are sampled, and so how training scores them."""
    limit = config.max_new_tokens
    return Sampling(config.temperature, config.top_p, config.top_k, max_new_tokens=limit)


# ---- the share of guided rollouts (Eq. 12) -------------------------------------------------------


def points_of(schedule):
    """The points of a schedule, named or written out: "0:1,1:0" -> [(0.0, 1.0), (1.0, 0.0)].

    Raises ValueError if it cannot be one.
    """
    forms = f"{', '.join(SCHEDULES)}, nor points tau:rho between 0 and 1 of rising tau"
    problem = f"--schedule '{schedule}' is none of {forms}"
    points = []
    for point in SCHEDULES.get(schedule, schedule).split(","):
        try:
            tau, rho = point.split(":")
            tau, rho = float(tau), float(rho)
        except ValueError:
            raise ValueError(problem) from None

        if not (0 <= tau <= 1 and 0 <= rho <= 1):
            raise ValueError(problem)
        if points and tau < points[-1][0]:
            raise ValueError(problem)
        points.append((tau, rho))
    return points


def rho_at(points, tau):
    """The share of each group that carries a prefix when the share tau of the training is done."""
    first_tau, first_rho = points[0]
    if tau < first_tau:
        return first_rho
    for (tau0, rho0), (tau1, rho1) in zip(points, points[1:]):
        if tau0 <= tau < tau1:
            return rho0 + (rho1 - rho0) * (tau - tau0) / (tau1 - tau0)
    last_tau, last_rho = points[-1]
    return last_rho


def guided_count(rho, group, u):
    """rho * G rounded up or down by u, uniform in [0, 1).

    Our choice: its mean is rho * G, which the nearest integer's is not.
    """
    return math.ceil(rho * group - u)


# ---- advantages, weights and loss (Eq. 13, 14) ---------------------------------------------------


def advantages(rewards, how):
    """rewards [P, G] -> advantages [P, G], each group (a row) against its own baseline (Eq. 13).

    mean-std: (r - mean) / (std + 1e-4), with the sample standard deviation. mean: r - mean.
    leave-one-out: r - mean of the *other* G - 1 rollouts, which is `mean` times G / (G - 1).
    Example: (1, 0, 0, 0) gives leave-one-out (1, -1/3, -1/3, -1/3).
    """
    group = rewards.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)
    if how == "mean":
        return centred
    if how == "mean-std":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    if how == "leave-one-out":
        return centred * group / (group - 1)
    raise ValueError(f"--advantage '{how}' is unknown: choose mean-std, mean or leave-one-out")


def token_weight(mean_over, length, all_tokens, all_rollouts, max_new_tokens):
    """What one token of a completion of `length` tokens counts in the loss.

    all_tokens, all_rollouts: of the whole minibatch, over all ranks, so that the losses of
    micro-batches and ranks add up to the mean.
    """
    if mean_over == "token":  # DAPO: a mean over tokens
        return 1.0 / all_tokens
    if mean_over == "sequence":  # GRPO, GSPO: a mean over completions of their token means
        return 1.0 / (length * all_rollouts)
    if mean_over == "constant":  # Dr. GRPO: the length of a completion changes no token's weight
        return 1.0 / (max_new_tokens * all_rollouts)
    raise ValueError(f"--mean-over '{mean_over}' is unknown: choose sequence, token or constant")


@dataclass
class Tokens:
    """The N completion tokens of R rollouts of a micro-batch, side by side."""

    rollout_of_token: torch.Tensor  # [N], 0 to R - 1
    sampler_logprobs: torch.Tensor  # [N], as the decoder sampled them
    old_logprobs: torch.Tensor  # [N], under pi_old, from which the ratio is measured
    reference_logprobs: torch.Tensor | None  # [N], under pi_ref; None without a KL term
    advantage: torch.Tensor  # [R]
    weight: torch.Tensor  # [R]


def policy_loss(logprobs, tokens, ratio="token", clip_low=0.2, clip_high=0.2, tis=0.0, kl=0.0):
    """PPO's clipped surrogate (Eq. 14) over the N tokens of R completions.

        loss = sum_t weight * (-tis_weight_t * min(r_t A, clip(r_t) A) + kl * k3_t)
        r_t = pi(o_t) / pi_old(o_t)
            ratio "sequence" (GSPO): the geometric mean of these ratios over the completion
        clip(r) = r held between 1 - clip_low and 1 + clip_high
        tis_weight_t = min(pi_old(o_t) / pi_sampler(o_t), tis)      1 where tis is 0: no correction
        k3_t = x - log x - 1 with x = pi_ref(o_t) / pi(o_t)         estimates KL(pi || pi_ref)

    logprobs [N] (differentiable): under pi. tokens: Tokens. Returns (loss, {name: [N]}): what is
    measured on each token; a metric that is added here is logged.
    """
    advantage = tokens.advantage[tokens.rollout_of_token]  # [N]
    weight = tokens.weight[tokens.rollout_of_token]  # [N]

    # r_t
    log_ratio = logprobs - tokens.old_logprobs
    if ratio == "sequence":
        zeros = torch.zeros_like(tokens.weight)
        sums = zeros.index_add(0, tokens.rollout_of_token, log_ratio)  # [R]
        lengths = tokens.rollout_of_token.bincount(minlength=len(zeros))  # [R]
        log_ratio = (sums / lengths)[tokens.rollout_of_token]  # [N]
    elif ratio != "token":
        raise ValueError(f"--ratio '{ratio}' is unknown: choose token or sequence")
    r = log_ratio.exp()

    # min(r_t A, clip(r_t) A)
    surrogate = r * advantage
    surrogate_clipped = r.clamp(1 - clip_low, 1 + clip_high) * advantage
    objective = torch.minimum(surrogate, surrogate_clipped)

    # Truncated importance sampling, for a sampler that was not quite pi_old.
    tis_weight = torch.ones_like(logprobs)
    if tis:
        tis_weight = (tokens.old_logprobs - tokens.sampler_logprobs).exp().clamp(max=tis)
    loss = -tis_weight * objective

    k3 = torch.zeros_like(logprobs)
    if tokens.reference_logprobs is not None:
        log_x = tokens.reference_logprobs - logprobs
        k3 = log_x.exp() - log_x - 1
        loss = loss + kl * k3

    per_token = {
        "tokens": torch.ones_like(logprobs),
        "clip_share": (surrogate_clipped < surrogate).float(),
        "log_ratio": (logprobs - tokens.sampler_logprobs).abs(),
        "tis_weight": tis_weight,
        "kl": k3,
    }
    for name, values in per_token.items():
        per_token[name] = values.detach()
    return (loss * weight).sum(), per_token


# ---- rollouts: plan, generate, judge, compare ----------------------------------------------------


@dataclass
class Rollout:
    """One sampled answer; each stage of a step fills in its part."""

    # planned
    prompt_number: int  # in the step: 0 to P - 1; its replacement in round n has p + n P
    row: dict  # of the task
    prompt: Prompt
    prefix: Prefix  # what conditions it; an empty one (embeddings None) for an unguided rollout
    seed: int  # of its tokens
    # generated
    completion_ids: list | None = None  # the end token included, if one was produced
    logprobs: list | None = None  # as sampled
    finish: str = ""  # "stop" or "length"
    text: str = ""
    # judged
    rewards: dict | None = None  # by name
    reward: float = 0.0  # their weighted sum
    # compared
    advantage: float = 0.0
    # weighed
    weight: float = 0.0  # what each of its tokens counts in the loss; 0: nothing, it is masked
    # scored, where the loss needs it
    old_logprobs: list | None = None  # under pi_old, where that is not the sampler (--tis)
    reference_logprobs: list | None = None  # under the starting policy (--kl)

    @property
    def guided(self):
        return self.prefix.embeddings is not None

    @property
    def positions(self):
        """How many positions it takes: prefix, prompt and completion."""
        count = len(self.prompt.ids) + len(self.completion_ids)
        if self.guided:
            count += len(self.prefix.embeddings)
        return count


@dataclass
class Sampler:
    """What makes and judges the rollouts of one run."""

    decoder: Decoder
    reader: vae.Reader
    task: Task
    rewards: list[Reward]
    palette: Palette
    schedule: list  # points (tau, rho)
    seed: int


def plan(rows, step, sampler, config):
    """G rollouts for each task row, the first few of each group guided.

    rows: {prompt number: task row}. Eq. 12: a share rho of each group reasons under a prefix.
    """
    rho = rho_at(sampler.schedule, step / config.steps)
    instruction = sampler.task.instruction
    rollouts = []
    for number, row in rows.items():
        prompt = prompt_of(row, sampler.reader, instruction, config.prompt)
        u = random.Random(seed_of(sampler.seed, "guided", step, number)).random()
        guided = guided_count(rho, config.group, u)

        prefix_of_latent = {}  # one object for all that share a latent: its tokens are scored once
        for g in range(config.group):
            prefix = Prefix()
            if g < guided:
                latent_number = g if config.latent_per == "rollout" else 0
                if latent_number not in prefix_of_latent:
                    latent_seed = seed_of(sampler.seed, "latent", step, number, latent_number)
                    prefix_of_latent[latent_number] = sampler.palette.draw(latent_seed)
                prefix = prefix_of_latent[latent_number]
            token_seed = seed_of(sampler.seed, "rollout", step, number, g)
            rollouts.append(Rollout(number, row, prompt, prefix, token_seed))
    return rollouts


def generate(rollouts, sampler, config):
    """Fill in each rollout's completion, log-probs, finish reason and text."""
    prompts = [rollout.prompt for rollout in rollouts]
    prefixes = [rollout.prefix.embeddings for rollout in rollouts]
    seeds = [rollout.seed for rollout in rollouts]
    completions, texts = complete(
        sampler.decoder,
        sampler.reader,
        prompts,
        prefixes,
        sampling_of(config),
        seeds,
        config.prompt,
    )
    for rollout, completion, text in zip(rollouts, completions, texts):
        rollout.completion_ids = completion.ids
        rollout.logprobs = completion.logprobs
        rollout.finish = completion.finish
        rollout.text = text


def judge(rollouts, sampler, config):
    """Fill in each rollout's rewards by name, and the reward that it is trained on."""
    scores = score_rewards(
        sampler.rewards,
        sampler.task,
        completions=[rollout.text for rollout in rollouts],
        rows=[rollout.row for rollout in rollouts],
        finishes=[rollout.finish for rollout in rollouts],
        completion_ids=[rollout.completion_ids for rollout in rollouts],
        max_new_tokens=config.max_new_tokens,
    )
    for rollout, values in zip(rollouts, scores):
        rollout.rewards = values
        rollout.reward = weighted_sum(values, sampler.rewards)
        if config.truncated == "penalise" and rollout.finish == "length":
            rollout.reward -= 1.0


def compare(rollouts, config):
    """Fill in each rollout's advantage in its group (Eq. 13).

    Without signal (equal rewards) it is exactly 0: no backward pass for rounding errors.
    """
    rewards = torch.tensor([rollout.reward for rollout in rollouts]).view(-1, config.group)
    silent = (rewards == rewards[:, :1]).all(1, keepdim=True)  # [P, 1]
    values = advantages(rewards, config.advantage).masked_fill(silent, 0.0)  # [P, G]
    for rollout, value in zip(rollouts, values.flatten().tolist()):
        rollout.advantage = value


def groups_of(rollouts, config):
    """The rollouts, group behind group, as a list of groups."""
    starts = range(0, len(rollouts), config.group)
    return [rollouts[start : start + config.group] for start in starts]


def is_silent(group):
    """Whether a group has no signal: nothing tells its rollouts apart."""
    return all(rollout.advantage == 0 for rollout in group)


def collect(step, sampler, config, ranks):
    """The compared rollouts of this rank's prompts of the step, group behind group.

    Dynamic sampling (DAPO): a group without signal is replaced by a fresh prompt's, at most
    --resample times. Rows and seeds of replacements are functions of (seed, step, number); every
    rank replaces its own.
    """
    candidates = sft.rows_of_step(
        sampler.task.train, step, config.prompts, sampler.seed, extra=config.resample
    )
    group_at = {}  # place in the step -> its group, the last one that was rolled out
    numbers = ranks.shard(list(range(config.prompts)))
    for _round in range(1 + config.resample):
        rows = {number: candidates[number] for number in numbers}
        rollouts = plan(rows, step, sampler, config)
        generate(rollouts, sampler, config)
        judge(rollouts, sampler, config)
        compare(rollouts, config)

        replacements = []
        for number, group in zip(numbers, groups_of(rollouts, config)):
            group_at[number % config.prompts] = group
            if is_silent(group):
                replacements.append(number + config.prompts)
        numbers = replacements
        if not numbers:
            break

    collected = []
    for group in group_at.values():
        collected.extend(group)
    return collected


# ---- the update: weigh, score, loss --------------------------------------------------------------


def weigh(rollouts, config, ranks):
    """Fill in what a token of each rollout counts in the loss.

    Groups without signal are counted. With --truncated mask a completion that the length limit cut
    off is not, and weighs 0; its reward still stands in its group's baseline (as in DAPO's filter).
    """
    unmasked = []
    for rollout in rollouts:
        rollout.weight = 0.0
        if config.truncated != "mask" or rollout.finish != "length":
            unmasked.append(rollout)

    tokens = sum(len(rollout.completion_ids) for rollout in unmasked)
    all_tokens, all_rollouts = ranks.all_reduce_sum([tokens, len(unmasked)])
    for rollout in unmasked:
        length = len(rollout.completion_ids)
        rollout.weight = token_weight(
            config.mean_over, length, all_tokens, all_rollouts, config.max_new_tokens
        )


def score(model, rollouts, config, ranks, with_entropy=False):
    """Log-probs [N] and entropies [N] of all their tokens, each rollout under its own prefix."""
    with sft.autocast(ranks.device, config.precision):
        return completion_logprobs(
            model,
            [rollout.prompt for rollout in rollouts],
            [rollout.completion_ids for rollout in rollouts],
            [rollout.prefix.embeddings for rollout in rollouts],
            sampling_of(config),
            with_entropy,
        )


def split_by_size(rollouts, config, ranks):
    """The rollouts as micro-batches of at most --tokens-per-batch positions, pads included."""
    sizes = [rollout.positions for rollout in rollouts]
    index_batches = ranks.pad_for_fsdp(micro_batches(sizes, config.tokens_per_batch))
    batches = []
    for indices in index_batches:
        batches.append([rollouts[i] for i in indices])
    return batches


@torch.no_grad()
def score_under(model, rollouts, config, ranks):
    """The log-probs of each rollout under a model, a list; None for one not trained on."""
    trained = [rollout for rollout in rollouts if rollout.advantage or config.kl]
    logprobs_of = {}
    for micro_batch in split_by_size(trained, config, ranks):
        logprobs, _ = score(model, micro_batch, config, ranks)
        lengths = [len(rollout.completion_ids) for rollout in micro_batch]
        if not micro_batch:  # under FSDP another rank has one micro-batch more
            continue
        for rollout, values in zip(micro_batch, logprobs.split(lengths)):
            logprobs_of[id(rollout)] = values.tolist()
    return [logprobs_of.get(id(rollout)) for rollout in rollouts]


def score_baselines(rollouts, model, reference, config, ranks):
    """Fill in the log-probs under pi_ref (--kl), and under pi_old where several updates need it."""
    if config.kl:
        for rollout, logprobs in zip(rollouts, score_under(reference, rollouts, config, ranks)):
            rollout.reference_logprobs = logprobs
    if config.tis and config.epochs * config.minibatches > 1:
        for rollout, logprobs in zip(rollouts, score_under(model, rollouts, config, ranks)):
            rollout.old_logprobs = logprobs


def loss_of(rollouts, logprobs, entropy, config):
    """policy_loss of a micro-batch, from its log-probs [N] under pi; entropy [N] is measured, too.

    pi_old is the sampler, unless it was scored apart: with --tis it has been (score_under), or,
    where this update is the only one, it is what this very forward found.
    """
    rollout_of_token = []
    sampler_logprobs = []
    old_logprobs = []
    reference_logprobs = []
    for i, rollout in enumerate(rollouts):
        rollout_of_token += [i] * len(rollout.completion_ids)
        sampler_logprobs += rollout.logprobs
        old_logprobs += rollout.old_logprobs or rollout.logprobs
        if config.kl:
            reference_logprobs += rollout.reference_logprobs

    device = logprobs.device
    tokens = Tokens(
        rollout_of_token=torch.tensor(rollout_of_token, dtype=torch.long, device=device),
        sampler_logprobs=torch.tensor(sampler_logprobs, device=device),
        old_logprobs=torch.tensor(old_logprobs, device=device),
        reference_logprobs=None,
        advantage=torch.tensor([rollout.advantage for rollout in rollouts], device=device),
        weight=torch.tensor([rollout.weight for rollout in rollouts], device=device),
    )
    if config.kl:
        tokens.reference_logprobs = torch.tensor(reference_logprobs, device=device)
    if config.tis and all(rollout.old_logprobs is None for rollout in rollouts):
        tokens.old_logprobs = logprobs.detach()

    loss, per_token = policy_loss(
        logprobs, tokens, config.ratio, config.clip_low, config.clip_high, config.tis, config.kl
    )
    per_token["entropy"] = entropy
    return loss, per_token


@dataclass
class Update:
    """What one gradient step measured, on this rank."""

    loss: float
    gradient_norm: float  # over all ranks, before clipping
    sums: dict  # {name: sums [2] over unguided and guided tokens}


def update(model, optimizer, rollouts, config, ranks):
    """One gradient step on this rank's rollouts of a minibatch.

    A rollout without advantage has no gradient and costs no forward pass, unless a KL term wants
    one.
    """
    weigh(rollouts, config, ranks)
    trained = []
    for rollout in rollouts:
        has_gradient = rollout.advantage != 0 or config.kl
        if rollout.weight and has_gradient:
            trained.append(rollout)

    # A rank that trains on nothing takes part in the sums of metrics, with zeros by their names.
    nothing = torch.zeros(0)
    _, per_token = loss_of([], nothing, nothing, config)
    sums = {}
    sft.add_metrics(sums, per_token, guided=[])

    loss_sum = 0.0
    for micro_batch in split_by_size(trained, config, ranks):
        logprobs, entropy = score(model, micro_batch, config, ranks, with_entropy=True)  # [N], [N]
        if not micro_batch:  # under FSDP another rank has one micro-batch more: keep in step
            logprobs.sum().backward()
            continue

        loss, per_token = loss_of(micro_batch, logprobs, entropy, config)
        loss.backward()

        loss_sum += loss.item()
        guided = []
        for rollout in micro_batch:
            guided += [rollout.guided] * len(rollout.completion_ids)
        sft.add_metrics(sums, per_token, guided)

    gradient_norm = sft.apply_gradients(model, [optimizer], ranks)
    return Update(loss_sum, gradient_norm, sums)


# ---- metrics -------------------------------------------------------------------------------------


def measure(rollouts, updates, config, ranks):
    """The metrics of a step over all ranks, by name: one row of metrics.jsonl.

    Means over rollouts and over trained tokens, of guided and unguided ones apart as well.
    """
    metrics = sft.mean_metrics(rollout_sums(rollouts), "rollouts", ranks)

    token_sums = {}
    for result in updates:
        for name, sums in result.sums.items():
            token_sums[name] = token_sums.get(name, 0) + sums
    metrics.update(sft.mean_metrics(token_sums, "tokens", ranks))

    # The first update's gap is that between decoder and training forward: no step has moved pi yet.
    first_metrics = sft.mean_metrics(updates[0].sums, "tokens", ranks)
    metrics["log_ratio_start"] = first_metrics["log_ratio"]

    groups = groups_of(rollouts, config)
    silent = 0
    resampled = 0
    for group in groups:
        silent += is_silent(group)
        resampled += group[0].prompt_number // config.prompts  # the round it was rolled out in
    loss = sum(result.loss for result in updates) / len(updates)
    totals = ranks.all_reduce_sum([loss, len(groups), silent, resampled])
    metrics["loss"] = totals[0]
    metrics["groups"] = int(totals[1])
    metrics["groups_without_signal"] = int(totals[2])
    metrics["groups_resampled"] = int(totals[3])

    norms = [result.gradient_norm for result in updates]
    metrics["gradient_norm"] = sum(norms) / len(norms)
    return metrics


def rollout_sums(rollouts):
    """{name: sums [2]} of what is measured on each rollout, over unguided and guided ones."""
    values = {
        "rollouts": [1.0 for _ in rollouts],
        "reward": [rollout.reward for rollout in rollouts],
        "advantage": [rollout.advantage for rollout in rollouts],
        "length": [len(rollout.completion_ids) for rollout in rollouts],
        "stopped": [rollout.finish == "stop" for rollout in rollouts],
    }
    for name in rollouts[0].rewards:
        values[name] = [rollout.rewards[name] for rollout in rollouts]

    tensors = {}
    for name, numbers in values.items():
        tensors[name] = torch.tensor(numbers, dtype=torch.float64)
    sums = {}
    sft.add_metrics(sums, tensors, [rollout.guided for rollout in rollouts])
    return sums


def sample_row(rollout, step, source):
    """What samples.jsonl keeps of a rollout: enough to read it, and to rebuild its prefix."""
    latent = rollout.prefix.latent  # None for an unguided one, and for the controls
    if latent is not None:
        latent = latent.tolist()
    return {
        "step": step,
        "prompt": rollout.prompt_number,
        "prompt_ids": rollout.prompt.ids,
        "completion": rollout.text,
        **rollout.rewards,
        "reward": rollout.reward,
        "advantage": rollout.advantage,
        "finish": rollout.finish,
        "prefix": source if rollout.guided else "none",
        "latent": latent,
    }


def log_samples(rollouts, step, source, run, config):
    """Keep the first (guided, if any is) and the last rollout of each group of rank 0."""
    groups = groups_of(rollouts, config)
    firsts = [group[0] for group in groups]
    lasts = [group[-1] for group in groups]
    run.log("samples", *[sample_row(rollout, step, source) for rollout in firsts + lasts])


# ---- the loop ------------------------------------------------------------------------------------


def train_policy(model, sampler, run, config, reference=None):
    """The RL loop of one run, from the run folder's newest checkpoint on.

    Every --eval-every steps, and at both ends, a greedy evaluation *without* prefix.
    """
    ranks = run.ranks
    optimizer = sft.make_optimizer(model, config.lr)
    start = run.restore(model, [optimizer])
    accuracy = None
    if start == 0:
        accuracy = evaluate_policy(0, model, sampler, run, config)
        run.log("metrics", {"step": 0, "eval_accuracy": accuracy})

    steps = range(start, config.steps)
    name = run.folder.name
    bar = tqdm(steps, name, config.steps, initial=start, disable=not run.writes)
    for step in bar:
        # Plan, generate, judge, compare.
        began = time.time()
        rollouts = collect(step, sampler, config, ranks)
        rollout_seconds = time.time() - began
        sampler.decoder.refresh()  # its packed weights are not held over the update

        # Weigh and update; before any update moves pi, note what the loss compares it with.
        score_baselines(rollouts, model, reference, config, ranks)
        minibatch_size = len(rollouts) // config.minibatches
        updates = []
        for _epoch in range(config.epochs):
            for first in range(0, len(rollouts), minibatch_size):
                minibatch = rollouts[first : first + minibatch_size]
                updates.append(update(model, optimizer, minibatch, config, ranks))

        # Measure and log.
        metrics = {"step": step + 1, "rho": rho_at(sampler.schedule, step / config.steps)}
        metrics.update(measure(rollouts, updates, config, ranks))
        metrics["seconds_rollout"] = round(rollout_seconds, 3)
        metrics["seconds"] = round(time.time() - began, 3)
        last = step + 1 == config.steps
        if last or (step + 1) % config.eval_every == 0:
            accuracy = evaluate_policy(step + 1, model, sampler, run, config)
            metrics["eval_accuracy"] = accuracy
        run.log("metrics", metrics)
        log_samples(rollouts, step + 1, sampler.palette.source, run, config)
        bar.set_postfix(rho=metrics["rho"], reward=metrics["reward"], accuracy=accuracy)

        if not last and (step + 1) % config.save_every == 0:
            run.save(step + 1, model, [optimizer])
    run.finish(model, sampler.reader)


def evaluate_policy(step, model, sampler, run, config):
    """Greedy accuracy without prefix after `step` steps; the best policy so far is kept."""
    accuracy = evaluate.greedy_accuracy(
        sampler.decoder, sampler.reader, sampler.task, config, run.ranks
    )
    run.keep_best(step, accuracy, model, sampler.reader)
    return accuracy


# ---- the stages before RL ------------------------------------------------------------------------


def vae_folder(config):
    """Where the VAE lies, or will."""
    return config.vae or f"{config.out}/vae"


def prepare(config, ranks):
    """Build what is missing below RL (base model, VAE, warm-up), and wait for all ranks.

    What is there is used as it is, if it was made with the same settings, and refused otherwise.
    Returns {schedule: folder of the policy that RL starts from}; that of "none" has seen no prefix.
    """
    corpus = prepare_base(config, ranks)
    named_by_user = config.vae is not None and Path(config.vae, "config.json").is_file()
    with stage("VAE", vae_folder(config), "vae.py", ranks):
        if ranks.rank == 0 and not named_by_user:
            vae.train(vae.VAEConfig(out=vae_folder(config), **corpus))

    policies = {}
    for schedule in config.schedule:
        source = "none" if schedule == "none" else config.warm_up
        folder = sft.warm_up_folder(config.out, config.model, source)
        policy = f"{folder}/policy"
        if policy not in policies.values():
            settings = warm_up_settings(config, source)
            with stage("warm-up", folder, "sft.py", ranks):
                sft.train(sft.SFTConfig(out=folder, resume=True, **settings, **corpus), ranks)
        policies[schedule] = policy
    return policies


def warm_up_settings(config, source):
    """The settings of the warm-up under prefixes of a source, but for its model, traces and out."""
    settings = sft.warm_up_defaults(config.model, source)
    if vae.VAE.load(vae_folder(config)).rows_per_z > 1:
        settings.pop("lengths", None)  # rows that are parts of a whole are taken whole
    for name in ("lr", "steps"):
        value = getattr(config, f"sft_{name}")
        if value is not None:
            settings[name] = value
    for name in ("device", "precision", "fsdp", "checkpointing"):
        settings[name] = getattr(config, name)
    settings.update(source=source, vae=vae_folder(config), prompt=style_of_answers(config))
    return settings


def style_of_answers(config):
    """The prompt format of worked answers; few-shot is one of questions: no examples precede."""
    return "plain" if config.prompt == "few-shot" else config.prompt


def corpus_of(config):
    """{model, traces, limit}: what VAE and warm-up read."""
    corpus = {"model": config.model, "traces": config.traces, "limit": config.limit}
    if world_of(config.model) is not None:
        base = f"{config.out}/base"
        corpus["model"] = base
        if not config.traces:
            corpus["traces"] = [f"{base}/traces.jsonl"]
            corpus["limit"] = 10**9
    return corpus


def prepare_base(config, ranks):
    """Make a world's base model. Returns corpus_of the settings."""
    corpus = corpus_of(config)
    world = world_of(config.model)
    if world is None:
        return corpus
    base = corpus["model"]
    with stage("base model", base, world.__file__, ranks):
        if ranks.rank == 0:
            steps = {} if config.base_steps is None else {"steps": config.base_steps}
            world.make_policy(base, seed=config.base_seed, **steps)
    return corpus


@contextlib.contextmanager
def stage(name, folder, script, ranks):
    """Announce a stage, and wait for all ranks at its end.

    Where its result was made with other settings, say which command replaces it: --overwrite of
    grpo.py is for RL runs, not for what they start from.
    """
    if ranks.rank == 0:
        print(f"stage: {name} in {folder}", flush=True)
    try:
        yield
    except ValueError as error:
        command = f"replace it: python {script} ... --overwrite"
        message = str(error).replace("--overwrite to replace it", command)
        raise ValueError(message) from None
    ranks.wait()


# ---- the job: one run for each schedule and seed, tables at the end ------------------------------


@dataclass
class RunPlan:
    """One RL run of a job."""

    schedule: str
    seed: int
    folder: Path
    settings: dict  # what its config.json keeps


def start_suffix(config):
    """What tells results apart that start from another warm-up than the default one."""
    if config.warm_up == sft.default_source(config.model):
        return ""
    return f"-from-{config.warm_up}"


def run_plans(config):
    """A RunPlan for each schedule with each seed."""
    plans = []
    for schedule in config.schedule:
        name = schedule
        if schedule not in SCHEDULES:
            name = "rho" + schedule.replace(":", "=").replace(",", "_")
        if config.source != "prior" and schedule != "none":
            name += f"-{config.source}"
        if schedule != "none":
            name += start_suffix(config)
        for seed in config.seed:
            folder = Path(config.out) / f"{config.algorithm}-{name}-s{seed}"
            settings = {**vae.result_settings(config), "schedule": schedule, "seed": seed}
            plans.append(RunPlan(schedule, seed, folder, settings))
    return plans


def check(config, task, ranks):
    """ValueError for all that can be known to be wrong before any work."""
    if config.prompts % (ranks.world * config.minibatches):
        parts = f"{ranks.world} ranks x {config.minibatches} minibatches"
        raise ValueError(f"--prompts {config.prompts} cannot be split over {parts}")
    check_domains(config)
    base_traces = f"{config.out}/base/traces.jsonl"  # may still have to be made
    vae.check_traces(config.traces or [], config.limit, skip=[base_traces])

    world = world_of(config.model)
    if world is None:
        check_model(config, task, find_model(config.model))
    elif hasattr(world, "make_reader"):  # its model may still have to be made
        check_rows(config, task, world.make_reader())

    # Runs of other settings in the same folders.
    if not config.overwrite:
        for run_plan in run_plans(config):
            sft.is_finished(run_plan.folder, run_plan.settings, config.resume)


def check_model(config, task, name):
    """ValueError for a row that this model cannot read, or has too few positions for."""
    positions = vae.load_config(name).get_text_config().max_position_embeddings
    check_rows(config, task, vae.load_reader(name), positions)


def check_rows(config, task, reader, positions=None):
    rows = task.train + task.test[: max(config.eval_questions, config.closing_questions)]
    if task.is_grounding:  # pictures take long to read: the first must do
        rows = rows[:256]
    room = config.length + config.max_new_tokens
    check_prompts(rows, reader, task.instruction, config.prompt, room=room, positions=positions)


def check_domains(config):
    """ValueError for a --source that there is not, as far as the domains are known.

    They are the VAE's, if it is there; else a world's, or those that all of --traces name.
    """
    traces = config.traces or []
    domains = [spec.partition("=")[0] for spec in traces if "=" in spec]
    if Path(vae_folder(config), "config.json").is_file():
        domains = vae.VAE.load(vae_folder(config)).domains
    elif not traces:
        domains = world_domains(config.model)
    elif len(domains) < len(traces):
        return
    check_source(config.source, domains)


def train(config):
    """The whole job: what is missing below RL, the runs, tables and pictures.

    Returns {schedule: rl_figures} on rank 0, {} on the others.
    """
    ranks = Ranks.start(config.device, config.fsdp)
    task = load_task(config.task, config.train_data, config.test_data)
    rewards = load_rewards(config.reward, task)
    check(config, task, ranks)

    policies = prepare(config, ranks)
    check_domains(config)  # now the VAE names its domains
    check_model(config, task, policies[config.schedule[0]])
    traces = []
    if needs_vae(config.source):
        corpus = corpus_of(config)
        traces = vae.load_traces(corpus["traces"], corpus["limit"])
    folders = {}
    for run_plan in run_plans(config):
        run = Run(run_plan.folder, run_plan.settings, ranks, config.resume, config.overwrite)
        folders.setdefault(run_plan.schedule, []).append(run_plan.folder)
        if not run.finished:
            start = policies[run_plan.schedule]
            train_run(run_plan, run, task, rewards, start, config, traces)
        elif ranks.rank == 0:
            print(f"using {run_plan.folder}")

    ranks.close()  # the other ranks end here
    if ranks.rank != 0:
        return {}
    return report(config, policies, folders, ranks.device)


def train_run(run_plan, run, task, rewards, start, config, traces=()):
    """One RL run, from the policy in the folder `start`.

    traces: on which it is said, before the hours that RL takes, whether prefixes steer.
    """
    model, reader = sft.load_trainable(start, run.ranks, config)
    reference = None
    if config.kl:
        reference = sft.load_reference(start, model, run.ranks, config)

    source = "none" if run_plan.schedule == "none" else config.source
    latents = None
    if needs_vae(source):
        latents = vae.VAE.load(vae_folder(config))
    table = unshard(model.get_input_embeddings().weight.detach())
    palette = Palette(latents, table, source, config.length, tiled=not config.independent)

    ends = end_ids(model, reader.tokenizer)
    decoder = Decoder(model, ends, config.slots, dtype=PRECISIONS[config.rollout_precision])
    if latents is not None and config.length > 0 and traces:
        sft.say_control(
            "before RL",
            model=model,
            reader=reader,
            vae=latents,
            traces=traces,
            length=config.length,
            ranks=run.ranks,
            config=config,
            style=style_of_answers(config),
        )
    schedule = points_of(run_plan.schedule)
    sampler = Sampler(decoder, reader, task, rewards, palette, schedule, run_plan.seed)
    train_policy(model, sampler, run, config, reference)


# ---- the tables at the end -----------------------------------------------------------------------


def metrics_of(folder):
    """The rows of a run's metrics.jsonl; one that is still being written is left out."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    complete_lines = text.split("\n")[:-1]
    return [json.loads(line) for line in complete_lines]


def rl_figures(folders):
    """Greedy pass@1 without prefix over finished runs that differ in the seed alone.

    Returns {start: before RL; end: a list, by seed; mean, std: of the ends; course: the mean over
    all evaluations on the way, which is higher the sooner a run learns}.
    """
    starts = []
    ends = []
    courses = []
    for folder in folders:
        points = [row["eval_accuracy"] for row in metrics_of(folder) if "eval_accuracy" in row]
        starts.append(points[0])
        ends.append(points[-1])
        courses.append(sum(points) / len(points))

    std = 0.0
    if len(ends) > 1:
        std = statistics.stdev(ends)
    return {
        "start": starts[0],
        "end": ends,
        "mean": sum(ends) / len(ends),
        "std": std,
        "course": sum(courses) / len(courses),
    }


def rl_rows(figures_by_name):
    """{name: rl_figures} as rows of text, the head first."""
    table = [["run", "start", "end, by seed", "mean", "spread (std)", "mean over the run"]]
    for name, figures in figures_by_name.items():
        ends = [f"{end:.3f}" for end in figures["end"]]
        row = [name, f"{figures['start']:.3f}", ", ".join(ends)]
        for column in ("mean", "std", "course"):
            row.append(f"{figures[column]:.3f}")
        table.append(row)
    return table


def report(config, policies, folders, device):
    """The tables that close the job; returns {schedule: rl_figures}."""
    root = Path(config.out)
    suffix = start_suffix(config)
    name = f"{config.algorithm}-{config.source}{suffix}"
    figures = {schedule: rl_figures(runs) for schedule, runs in folders.items()}
    named_figures = {f"{name} {schedule}": values for schedule, values in figures.items()}
    table = evaluate.markdown(rl_rows(named_figures))
    vae.write_text(root / f"{name}.json", json.dumps(figures, indent=1))
    vae.write_text(root / f"{name}.md", table + "\n")

    if config.closing_questions > 0:
        report_arms(config, policies, root / f"evaluation{suffix}")
    rollouts = f"{config.prompts} x {config.group} rollouts"
    print(f"\nWhat injection does in RL ({config.steps} steps of {rollouts}):\n")
    print(table)
    print(f"\n{evaluate.hardware(device)}")
    print(f"metrics and samples: {root}/{config.algorithm}-*")
    pictures = sorted(str(path) for path in root.glob("*/*.png"))
    print(f"pictures: {' '.join(pictures) or 'none'}")
    print(f"learning curves: python tutorials/reproduce.py --curves {root}/{config.algorithm}-*-s*")
    world = world_of(config.model)
    if config.closing_questions > 0 and hasattr(world, "finish"):
        print(world.finish(root), flush=True)
    return figures


def report_arms(config, policies, folder):
    """What prefixes do before RL: the arms of evaluate.py on the policy that RL started from."""
    policy = policies[config.schedule[0]]
    for schedule, warmed_up in policies.items():
        if schedule != "none":  # one that has seen prefixes, where there is one
            policy = warmed_up
    print(f"\nWhat prefixes do before RL (policy {policy}):", flush=True)

    task = config.task
    if config.test_data is not None:
        task = f"{config.task}={config.test_data}"
    shared = "prompt length independent temperature top_p top_k max_new_tokens slots device"
    settings = {name: getattr(config, name) for name in shared.split()}
    settings.update(model=policy, vae=vae_folder(config), task=[task], out=str(folder))
    arms = evaluate.EvaluateConfig(questions=config.closing_questions, **settings)

    # One of other settings is made anew: after all of RL a refusal would help nobody.
    stored = folder / "config.json"
    same = stored.is_file() and vae.read_json(stored) == vae.result_settings(arms)
    arms.resume = config.resume and same
    evaluate.evaluate(arms)


def main(argv=None):
    train(vae.parse_settings(GRPOConfig, __doc__, argv))


if __name__ == "__main__":
    vae.run_main(main, "grpo.py")
