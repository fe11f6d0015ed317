"""GRPO with latent injection (Sec. 3.4, Eq. 12-14): part of every group of rollouts reasons under a sampled prefix.

How this loop departs from the GRPO paper, and from Reasoning Palette where that leaves things open:
  1. A share rho(tau) of each group carries a prefix, the rest none; all of them share one group baseline (Eq. 12, 13).
     rho * G is rounded at random so that it is right on average; every guided rollout draws its own z (the paper draws one
     per prompt: --latent-per prompt), because a group that shares one strategy cannot compare strategies.
  2. The log-probs in the loss are conditioned on the same prefix that was sampled under (Eq. 14), at the same temperature
     and with the same filters. The old ones are what the decoder sampled from: no second forward pass makes them
     (log_ratio_start in the metrics says how far the two differ).
  3. The KL term to a reference is off by default, and then no reference model is held.
  4. Everything random is a pure function of (seed, step, prompt, rollout): a resumed run needs no generator state, and N
     ranks sample what one rank would.

Run it (the first command builds all that is missing: base model, VAE, warm-up):
    python grpo.py                                          # the tiny world, three schedules, a table at the end
    python grpo.py --model Qwen/Qwen3-0.6B --task gsm8k --out runs/qwen --traces math=... code=... --schedule two-phase
    torchrun --nproc_per_node=4 grpo.py --model ...         # the same on four GPUs: each rolls out its own prompts
"""
import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import sft
import vae as vae_stage
from prefix import (SOURCES, Decoder, Palette, Sampling, completion_logprobs, end_ids, load_tokenizer, micro_batches, texts_of,
                    whole)
from rewards import PROMPT_STYLES, STYLES, load_task, overlong, prompt_ids, stop_strings
from sft import Ranks, Run, apply_gradients, autocast, load_trainable, make_optimizer, seed_of, set_learning_rate
from vae import require_positive, run_main

# ---- the schedule and the share of guided rollouts (Eq. 12) -------------------------------------------------------------

SCHEDULES = {"none": lambda tau: 0.0,
             "constant": lambda tau: 1.0,
             "two-phase": lambda tau: 1.0 if tau < 0.5 else 0.0,
             "linear": lambda tau: 1.0 - tau}


def guided_count(rho, group, u):
    """How many of `group` rollouts carry a prefix: floor(rho G), plus one with the probability of the remainder.

    u: uniform number in [0, 1). The mean over u is rho G exactly, which rounding to the nearest integer is not.
    """
    whole = math.floor(rho * group + 1e-9)
    return whole + (u < rho * group - whole - 1e-9)


# ---- advantages and loss (Eq. 13, 14) -----------------------------------------------------------------------------------

def advantages(rewards, algorithm):
    """rewards [P, G] -> advantages [P, G], each group (a row) against its own baseline.

    grpo: (r - mean) / (std + 1e-4), with the sample standard deviation. rloo: r - mean of the *other* G - 1 rollouts.
    dr-grpo: r - mean, no division by the std (Liu et al. 2025). Example: rewards (1, 0, 0, 0) give rloo (1, -1/3, -1/3, -1/3).
    """
    group = rewards.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)
    if algorithm == "grpo":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    return centred * group / (group - 1) if algorithm == "rloo" else centred


def policy_loss(logprobs, old, advantage, weight, clip_low=0.2, clip_high=0.2, reference=None, kl_weight=0.0):
    """PPO's clipped surrogate over a flat list of N completion tokens, with the k3 estimate of KL(policy || reference).

    logprobs [N] under the policy (differentiable), old [N] as sampled, advantage [N] (its rollout's), weight [N]: what each
    token counts in the mean, e.g. 1 / (tokens of all rollouts on all ranks); so losses of micro-batches and ranks add up.
    Returns (loss, statistics summed over the tokens: clipped, |log_ratio|, kl).
    """
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    statistics = {"clipped": (clipped * advantage < ratio * advantage).sum().item(),
                  "log_ratio": log_ratio.detach().abs().sum().item(), "kl": 0.0}
    loss = -surrogate
    if reference is not None:
        gap = reference - logprobs                          # k3 (Schulman): exp(gap) - gap - 1, unbiased and never negative
        kl = gap.exp() - gap - 1
        loss, statistics["kl"] = loss + kl_weight * kl, kl.detach().sum().item()
    return (loss * weight).sum(), statistics


# ---- rollouts -----------------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One sampled answer. prefix [L, d] or None is what conditions it; latent [L or 1, k] is what rebuilds the prefix."""
    prompt: int                     # which of the step's P prompts
    prompt_ids: list
    completion_ids: list            # the end token included, if one was produced
    logprobs: list                  # as sampled
    finish: str                     # "stop" or "length"
    prefix: torch.Tensor | None
    latent: torch.Tensor | None
    text: str
    rewards: dict                   # by name
    reward: float                   # their weighted sum
    advantage: float = 0.0

    @property
    def guided(self):
        return self.prefix is not None

    @property
    def length(self):
        return len(self.prompt_ids) + len(self.completion_ids) + (len(self.prefix) if self.guided else 0)


def rows_of_step(task, step, prompts, seed):
    """The step's rows of the training set: every row once an epoch, each epoch in an order of its own."""
    count, start = len(task.train), step * prompts
    first = start // count
    epochs = range(first, (start + prompts - 1) // count + 1)
    order = [i for epoch in epochs for i in random.Random(seed_of(seed, "epoch", epoch)).sample(range(count), count)]
    return [task.train[i] for i in order[start - first * count:][:prompts]]


def collect(decoder, tokenizer, task, palette, step, args, ranks):
    """G rollouts for each of this rank's prompts of the step, the first `guided` of each group under a prefix. Scored."""
    rho = SCHEDULES[args.schedule](step / args.steps)
    asked = rows_of_step(task, step, args.prompts, args.seed)
    jobs = []                                               # (prompt index, rollout index, guided)
    for p in ranks.own(range(args.prompts)):
        guided = guided_count(rho, args.group, random.Random(seed_of(args.seed, "guided", step, p)).random())
        jobs += [(p, g, g < guided) for g in range(args.group)]
    latent_seeds = [seed_of(args.seed, "latent", step, p, g if args.latent_per == "rollout" else 0) for p, g, _ in jobs]
    prefixes, latents = palette.draw(latent_seeds)
    prefixes = [prefix if guided else None for prefix, (_, _, guided) in zip(prefixes, jobs)]
    ids = {p: prompt_ids(asked[p]["question"], tokenizer, task.instruction, args.prompt) for p, _, _ in jobs}
    completions = decoder.generate([ids[p] for p, _, _ in jobs], prefixes, sampling_of(args),
                                   [seed_of(args.seed, "rollout", step, p, g) for p, g, _ in jobs])
    completions, texts = texts_of(completions, tokenizer, stop_strings(tokenizer, args.prompt))
    rollouts = []
    for (p, _, guided), prefix, latent, c, text in zip(jobs, prefixes, latents, completions, texts):
        rewards = task.judge(text, asked[p]["answer"], c.finish)
        rewards["overlong"] = overlong(len(c.ids), args.max_new_tokens, args.max_new_tokens // 5)
        reward = sum(weight * rewards[name] for name, weight in args.reward.items())
        rollouts.append(Rollout(p, ids[p], c.ids, c.logprobs, c.finish, prefix, latent if guided else None, text, rewards,
                                reward))
    return rollouts


def check_prompts(task, tokenizer, args):
    """Raises ValueError for a question whose prompt is over --max-prompt: before the run, not when its turn comes."""
    for row in task.train + task.test[:args.eval_questions]:
        length = len(prompt_ids(row["question"], tokenizer, task.instruction, args.prompt))
        if length > args.max_prompt:
            raise ValueError(f"a prompt of {length} tokens is over --max-prompt {args.max_prompt}: raise it, or drop the "
                             f"question {row['question'][:80]!r}")


def sampling_of(args):
    return Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_new_tokens=args.max_new_tokens)


# ---- one update ---------------------------------------------------------------------------------------------------------

def token_weights(rollouts, how, ranks, max_new_tokens):
    """What one token of each rollout counts in the loss, from *global* counts: a list with one weight per rollout.

    token: 1 / all tokens (DAPO). sequence: 1 / (its rollout's tokens x rollouts) (GRPO). constant: 1 / (rollouts x the
    longest possible completion) (Dr. GRPO). Rollouts without signal count in the denominators too.
    """
    tokens, count = ranks.total([sum(len(r.completion_ids) for r in rollouts), len(rollouts)])
    per = {"token": lambda n: tokens, "sequence": lambda n: n * count, "constant": lambda n: count * max_new_tokens}[how]
    return [1.0 / per(len(r.completion_ids)) for r in rollouts]


def update(model, optimizer, reference, rollouts, args, ranks):
    """One gradient step on this rank's rollouts. Returns sums over its completion tokens, and the gradient norm.

    Rollouts without advantage have no gradient and cost no forward pass, unless a KL term wants them.
    """
    weights = token_weights(rollouts, args.mean_over, ranks, args.max_new_tokens)
    live = [i for i, r in enumerate(rollouts) if r.advantage != 0 or reference is not None]
    lengths = [rollouts[i].length for i in live]
    sums = {"loss": 0.0, "tokens": 0, "clipped": 0, "log_ratio": 0.0, "kl": 0.0, "entropy": 0.0}
    for group in ranks.level(micro_batches(lengths, args.tokens_per_batch)):
        rows = [rollouts[live[i]] for i in group]
        batch = ([r.prompt_ids for r in rows], [r.completion_ids for r in rows], [r.prefix for r in rows], sampling_of(args))
        flat = lambda values: torch.tensor(values, device=ranks.device).repeat_interleave(
            torch.tensor([len(r.completion_ids) for r in rows], device=ranks.device))                      # [N]
        with autocast(ranks.device, args.precision):
            logprobs, entropy = completion_logprobs(model, *batch)                                          # [N], [N]
            with torch.no_grad():
                anchor = None if reference is None else completion_logprobs(reference, *batch, with_entropy=False)[0]
        if not rows:                                        # under FSDP another rank has one micro-batch more: keep in step
            logprobs.sum().backward()
            continue
        old = torch.tensor([value for r in rows for value in r.logprobs], device=ranks.device)
        loss, statistics = policy_loss(logprobs, old, flat([r.advantage for r in rows]), flat([weights[live[i]] for i in group]),
                                       args.clip_low, args.clip_high, anchor, args.kl)
        loss.backward()
        for name, value in {**statistics, "loss": loss.item(), "tokens": len(old), "entropy": entropy.sum().item()}.items():
            sums[name] += value
    return sums, apply_gradients(model, [optimizer], ranks)


def set_advantages(rollouts, args):
    """Fill in each rollout's advantage within its group. Returns (groups, groups without reward variance)."""
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, args.group)                 # [P, G]
    values, silent = advantages(rewards, args.algorithm), (rewards == rewards[:, :1]).all(1)
    values[silent] = 0.0                                    # exactly: no backward pass for rounding errors
    for rollout, value in zip(rollouts, values.flatten().tolist()):
        rollout.advantage = value
    return len(rewards), int(silent.sum())


# ---- the loop -----------------------------------------------------------------------------------------------------------

def train(model, tokenizer, task, palette, run, args, reference=None):
    """The RL loop: roll out, score, update; every --eval-every steps a greedy evaluation *without* prefix."""
    ranks, optimizer = run.ranks, make_optimizer(model, args.lr)
    state = run.restore(model, [optimizer])
    decoder = Decoder(model, end_ids(model, tokenizer), args.slots)
    if state["step"] == 0:
        run.log("metrics", {"step": 0, "eval_accuracy": evaluate.greedy_accuracy(decoder, tokenizer, task, args, ranks)})
    accuracy, bar = math.nan, tqdm(range(state["step"], args.steps), initial=state["step"], total=args.steps,
                                   desc=run.folder.name, disable=not run.writes)
    for step in bar:
        began = time.time()
        set_learning_rate(optimizer, args, step)
        rollouts = collect(decoder, tokenizer, task, palette, step, args, ranks)
        rolled = time.time()
        decoder.refresh()                                   # its packed weights are not held over the update
        groups, silent = set_advantages(rollouts, args)
        steps = []
        for epoch in range(args.epochs):
            share = args.prompts // args.minibatches // ranks.world * args.group
            for start in range(0, len(rollouts), share):
                steps.append(update(model, optimizer, reference, rollouts[start:start + share], args, ranks))
        row = summary(rollouts, steps, groups, silent, ranks)
        row = {"step": step + 1, "rho": SCHEDULES[args.schedule](step / args.steps), **row,
               "seconds_rollout": round(rolled - began, 3), "seconds": round(time.time() - began, 3)}
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            row["eval_accuracy"] = evaluate.greedy_accuracy(decoder, tokenizer, task, args, ranks)
            run.keep_best(step + 1, row["eval_accuracy"], model, tokenizer)
        accuracy = row.get("eval_accuracy", accuracy)
        bar.set_postfix(rho=f"{row['rho']:.2f}", reward=f"{row['reward']:.2f}", eval=f"{accuracy:.2f}")
        run.log("metrics", row)
        shown = rollouts[::args.group] + rollouts[args.group - 1::args.group]      # each group's first (guided, if any) and last
        run.log("samples", *[sample_row(r, step + 1, palette.source) for r in shown])
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            run.save(step + 1, model, [optimizer])
    run.finish(model, tokenizer)


def summary(rollouts, steps, groups, silent, ranks):
    """One row of metrics over all ranks: means over rollouts, guided and unguided apart, and over updated tokens."""
    parts = {"": rollouts, "_guided": [r for r in rollouts if r.guided], "_unguided": [r for r in rollouts if not r.guided]}
    names, sums = ["reward", "length", "stopped", *rollouts[0].rewards], []
    for own in parts.values():
        values = [[r.reward, len(r.completion_ids), r.finish == "stop", *r.rewards.values()] for r in own]
        sums += [len(own), *(sum(column) for column in zip(*values))] if own else [0] * (len(names) + 1)
    token_sums = [sum(step[0][name] for step in steps) for name in ("loss", "tokens", "clipped", "log_ratio", "kl", "entropy")]
    sums = ranks.total(sums + token_sums + [groups, silent, steps[0][0]["log_ratio"], steps[0][0]["tokens"]])
    width, row = len(names) + 1, {}
    for i, label in enumerate(parts):
        count, *values = sums[width * i:width * (i + 1)]
        row.update({"rollouts" + label: int(count), **{name + label: value / count if count else None
                                                       for name, value in zip(names, values)}})
    loss, tokens, clipped, log_ratio, kl, entropy, groups, silent, start_sum, start_tokens = sums[3 * width:]
    tokens = max(tokens, 1)
    return {**row, "loss": loss / len(steps), "clip_share": clipped / tokens, "kl": kl / tokens, "entropy": entropy / tokens,
            "log_ratio": log_ratio / tokens, "log_ratio_start": start_sum / max(start_tokens, 1),
            "gradient_norm": sum(norm for _, norm in steps) / len(steps),
            "groups": int(groups), "groups_without_signal": int(silent)}


def sample_row(rollout, step, source):
    """What samples.jsonl keeps of a rollout: enough to read it, and to rebuild its prefix."""
    return {"step": step, "prompt": rollout.prompt, "prompt_ids": rollout.prompt_ids, "completion": rollout.text,
            **rollout.rewards, "reward": rollout.reward, "advantage": rollout.advantage, "finish": rollout.finish,
            "prefix": source if rollout.guided else "none",
            "latent": rollout.latent.tolist() if rollout.latent is not None else None}


# ---- the stages before it, and the table after it -----------------------------------------------------------------------

def prepare(args, ranks):
    """Build what is missing below RL, each with the command a user would type. Returns {prefix kind: policy folder}."""
    root = Path(args.out)
    base = args.model
    if args.model == "tiny":
        base = str(root / "base")
        argv = ["pretrain", "--out", base, "--seed", str(args.base_seed), "--steps", str(args.base_steps), "--resume"]
        stage(sft.main, argv, "sft.py", ranks)
        args.traces = args.traces or [f"{base}/traces.jsonl"]
    traces = ["--traces", *args.traces]
    given, args.vae = args.vae, args.vae or str(root / "vae")
    if not (given and Path(given, "config.json").is_file()):            # a VAE that you name is used as it is
        argv = ["--model", base, "--out", args.vae, "--limit", str(args.limit), *traces]
        stage(vae_stage.main, argv, "vae.py", ranks, rank_0_only=True)
    policies = {}
    for kind in dict.fromkeys("none" if schedule == "none" else "prior" for schedule in args.schedules):
        folder = root / ("sft-none" if kind == "none" else "sft")
        argv = ["--model", base, "--vae", args.vae, "--prefix", kind, "--out", str(folder), "--lr", str(args.sft_lr), "--batch",
                str(args.sft_batch), "--limit", str(args.limit), *traces, "--precision", args.precision, "--device", args.device,
                "--prompt", "plain" if args.prompt == "few-shot" else args.prompt, "--resume",
                *(["--fsdp"] if args.fsdp else []), *(["--checkpointing"] if args.checkpointing else [])]
        stage(sft.main, argv, "sft.py", ranks)
        policies[kind] = str(folder / "policy")
    return policies


def stage(main_function, argv, script, ranks, rank_0_only=False):
    """Run another script's main. Where its result is there already it only compares the settings, and refuses others."""
    if ranks.rank == 0:
        print(f"python {script} {' '.join(argv)}", flush=True)
    if ranks.rank == 0 or not rank_0_only:
        main_function(argv)
    ranks.wait()


# ---- command line -------------------------------------------------------------------------------------------------------

# Defaults that differ between the tiny world and a real model, whose weights want far smaller steps.
TINY = dict(schedules=["none", "two-phase", "linear"], lr=4e-4, sft_lr=3e-6, steps=60, max_new_tokens=34, eval_questions=256,
            out="runs/tiny")
REAL = dict(schedules=["two-phase"], lr=1e-6, sft_lr=1e-5, steps=200, max_new_tokens=512, eval_questions=128, out="runs/real")
REWARDS = ("accuracy", "answered", "format", "undecided", "overlong")         # what Task.judge and collect give, by name
# What does not change a run's result, and so may differ when it is resumed.
# The settings of the stages before RL stand in those stages' own config.json.
NOT_RESULTS = (*sft.NOT_RESULTS, "schedules", "seeds", "slots", "arms", "arm_questions", "arm_samples", "base_seed", "base_steps",
               "sft_lr", "sft_batch", "limit", "vae", "traces")


def two(name):
    """The default of a flag in --help, where it depends on the model."""
    return f"(default: {TINY[name]} for tiny, {REAL[name]} otherwise)"


def add_model_flags(parser):
    """Flags on model, data, injection and loss."""
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", default="tiny", help="hub name, folder or tiny (default: tiny)")
    data.add_argument("--vae", help="VAE folder (default: OUT/vae, trained if it is missing)")
    data.add_argument("--traces", nargs="+", metavar="[DOMAIN=]SOURCE", help="for VAE and warm-up (default: the tiny world's)")
    data.add_argument("--limit", type=int, default=2000, help="traces kept per source of your own (default: 2000)")
    data.add_argument("--task", default="tiny", help="tiny, gsm8k, math, or a name for your own data (default: tiny)")
    data.add_argument("--train-data", help="JSONL of {question, answer} or hub:DATASET:CONFIG:SPLIT (default: the task's own)")
    data.add_argument("--test-data", help="the same for the evaluation on the way (default: the task's own)")
    data.add_argument("--prompt", choices=PROMPT_STYLES, default="auto", help="prompt format (default: auto)")
    data.add_argument("--max-prompt", type=int, default=1024, help="longest prompt allowed, in tokens (default: 1024)")
    data.add_argument("--out", help=f"folder of all stages {two('out')}")
    inject = parser.add_argument_group("injection")
    inject.add_argument("--schedule", nargs="+", dest="schedules", choices=list(SCHEDULES),
                        help=f"rho(tau); one run each {two('schedules')}")
    inject.add_argument("--source", default="prior", help=f"of prefixes: {', '.join(SOURCES)} or a domain (default: prior)")
    inject.add_argument("--length", type=int, default=8, help="prefix rows L (default: 8)")
    inject.add_argument("--independent", action="store_true", help="L independent latents instead of one tiled (default: tiled)")
    inject.add_argument("--latent-per", choices=("rollout", "prompt"), default="rollout", help="one z each (default: rollout)")
    loss = parser.add_argument_group("reward and loss")
    loss.add_argument("--reward", nargs="+", default=["accuracy=1"], metavar="NAME=WEIGHT",
                      help=f"the reward is their weighted sum; names: {', '.join(REWARDS)} (default: accuracy=1)")
    loss.add_argument("--algorithm", choices=("grpo", "rloo", "dr-grpo"), default="grpo", help="advantages (default: grpo)")
    loss.add_argument("--mean-over", choices=("token", "sequence", "constant"), default="token", help="(default: token)")
    loss.add_argument("--clip-low", type=float, default=0.2, help="PPO clip below 1 (default: 0.2)")
    loss.add_argument("--clip-high", type=float, default=0.2, help="PPO clip above 1 (default: 0.2)")
    loss.add_argument("--kl", type=float, default=0.0, help="weight of the KL to the starting policy (default: 0, none held)")
    loss.add_argument("--epochs", type=int, default=1, help="passes over each batch of rollouts (default: 1)")
    loss.add_argument("--minibatches", type=int, default=1, help="updates per pass (default: 1)")


def add_training_flags(parser):
    """Flags on training, sampling and evaluation."""
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, help=f"batches of rollouts {two('steps')}")
    training.add_argument("--prompts", type=int, default=8, help="prompts per step, over all ranks (default: 8)")
    training.add_argument("--group", type=int, default=8, help="rollouts per prompt G (default: 8)")
    training.add_argument("--lr", type=float, help=f"AdamW's learning rate {two('lr')}")
    training.add_argument("--sft-lr", type=float, help=f"of the warm-up {two('sft_lr')}")
    training.add_argument("--sft-batch", type=int, default=64, help="rows per warm-up update (default: 64)")
    training.add_argument("--seed", type=int, nargs="+", dest="seeds", default=[0], help="RL seeds, one run each (default: 0)")
    training.add_argument("--base-seed", type=int, default=0, help="seed of the tiny base model (default: 0)")
    training.add_argument("--base-steps", type=int, default=900, help="pretraining steps of the tiny base model (default: 900)")
    sampling = parser.add_argument_group("sampling of rollouts")
    sampling.add_argument("--temperature", type=float, default=1.0, help="(default: 1)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="(default: 1, off)")
    sampling.add_argument("--top-k", type=int, default=0, help="(default: 0, off)")
    sampling.add_argument("--max-new-tokens", type=int, help=f"longest completion {two('max_new_tokens')}")
    sampling.add_argument("--slots", type=int, default=64, help="rows decoded at a time (default: 64)")
    measure = parser.add_argument_group("evaluation")
    measure.add_argument("--eval-every", type=int, default=10, help="steps between greedy evaluations (default: 10)")
    measure.add_argument("--eval-questions", type=int, help=f"test questions of these {two('eval_questions')}")
    measure.add_argument("--arms", nargs="+", default=["all"], help="arms of the table at the end, or none (default: all)")
    measure.add_argument("--arm-questions", type=int, default=64, help="test questions of the arms (default: 64)")
    measure.add_argument("--arm-samples", type=int, default=32, help="samples a question in every arm (default: 32)")


def parse_args(argv=None):
    """The flags, with the model's own defaults filled in; exits with status 2 and one sentence if they cannot be right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_training_flags(parser)
    sft.add_machine_flags(parser, tokens_per_batch=8192, save_every=20)
    args = parser.parse_args(argv)
    for name, value in (TINY if args.model == "tiny" else REAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.model == "tiny" and not args.traces:
        args.limit = 10**9
    return checked(parser, args)


def checked(parser, args):
    """Refuse, before any work, what would fail after an hour or train on nothing."""
    require_positive(parser, args, "steps", "prompts", "epochs", "minibatches", "max_new_tokens", "max_prompt", "eval_every",
                     "eval_questions", "save_every", "slots", "tokens_per_batch", "arm_questions", "arm_samples", "sft_batch",
                     "limit", "base_steps")
    try:
        args.reward = {name: float(weight) for name, _, weight in (item.partition("=") for item in args.reward)}
    except ValueError:
        parser.error(f"--reward takes NAME=WEIGHT with a number as weight, not {' '.join(args.reward)}")
    for name in set(args.reward) - set(REWARDS):
        parser.error(f"unknown reward '{name}': choose from {', '.join(REWARDS)}")
    if args.group < 2:
        parser.error(f"--group must be at least 2, not {args.group}: {args.algorithm} compares the rollouts of one prompt")
    if args.length < 0:
        parser.error(f"--length must be 0 or more, not {args.length}")
    if args.temperature <= 0:
        parser.error("--temperature must be above 0 for rollouts: greedy ones are all the same and teach nothing")
    if args.model != "tiny" and not args.traces:
        parser.error("--traces is needed to train the VAE and to warm up a model other than tiny")
    domains = STYLES if args.model == "tiny" else [spec.partition("=")[0] for spec in args.traces or () if "=" in spec]
    if args.model == "tiny" or args.traces and len(domains) == len(args.traces):    # else rows or VAE name the domains
        if args.source not in (*SOURCES, *domains):
            parser.error(f"unknown --source '{args.source}': choose one of {', '.join([*SOURCES, *domains])}")
        evaluate.arms_of(args.arms if args.arms != ["none"] else ["all"], domains, args.temperature)
    for name in ("lr", "sft_lr", "kl", "clip_low", "clip_high", "lr_warmup"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(args, name)}")
    try:
        sampling_of(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    """All stages: what is missing below RL, one RL run per schedule and seed, tables and pictures."""
    args = parse_args(argv)
    ranks = Ranks.start(args.device, args.fsdp)
    task = load_task(args.task, args.train_data, args.test_data)
    if not task.train or not task.test:
        raise ValueError(f"the task '{args.task}' needs training and test rows: give --train-data and --test-data")
    if args.prompts % (ranks.world * args.minibatches):
        raise ValueError(f"--prompts {args.prompts} cannot be split over {ranks.world} ranks x {args.minibatches} minibatches")
    if args.model != "tiny":
        check_prompts(task, load_tokenizer(args.model), args)
    policies, folders = prepare(args, ranks), {}
    for args.schedule in args.schedules:
        for args.seed in args.seeds:
            source = "" if args.source == "prior" or args.schedule == "none" else f"-{args.source}"
            folder = Path(args.out) / f"{args.algorithm}-{args.schedule}{source}-s{args.seed}"
            config = {name: value for name, value in vars(args).items() if name not in NOT_RESULTS}
            run = Run(folder, config, ranks, args.resume, args.overwrite)
            folders.setdefault(args.schedule, []).append(folder)
            if not run.finished:
                train_one(args, task, run, policies["none" if args.schedule == "none" else "prior"])
            elif ranks.rank == 0:
                print(f"using {folder}")
    if ranks.world > 1:
        torch.distributed.destroy_process_group()
    if ranks.rank == 0:
        evaluate.close_rl(args, folders, policies, ranks.device)


def train_one(args, task, run, start):
    """One RL run from the warmed-up policy in the folder `start`."""
    model, tokenizer = load_trainable(start, run.ranks, args)
    reference = load_trainable(start, run.ranks, args, frozen=True)[0] if args.kl else None
    source = "none" if args.schedule == "none" else args.source
    latents = None if source in ("none", "noise") else vae_stage.VAE.load(args.vae)
    palette = Palette(latents, whole(model.get_input_embeddings().weight.detach()), source, args.length, not args.independent)
    train(model, tokenizer, task, palette, run, args, reference)


if __name__ == "__main__":
    run_main(main, "grpo.py")
