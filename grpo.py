"""GRPO with latent injection (Sec. 3.4, Eq. 12-14): part of every group of rollouts reasons under a sampled prefix.

One step of train(): collect() rolls out and judges, a share rho(tau) of each group under a prefix, and compares each group's
rollouts; update() takes a gradient step on policy_loss(). Departs from the GRPO paper, or chooses what Reasoning Palette leaves:
  1. Guided and unguided rollouts share one group baseline (Eq. 12, 13). rho * G is rounded at random, right on average. Every
     guided rollout draws its own z (the paper: one per prompt, --latent-per prompt): a group of one strategy can compare none.
  2. The loss scores each rollout under the same prefix, temperature and filters that it was sampled with (Eq. 14). pi_old is what
     the decoder sampled from, not a second forward (log_ratio_start tells how far the two differ; --tis corrects it).
  3. The KL term to a reference is off by default, and then no reference model is held.
  4. Everything random is a pure function of (seed, step, prompt, rollout): a resumed run needs no generator state, and N
     ranks sample what one rank would.

Run it (the first command builds all that is missing: base model, VAE, warm-up):
    python grpo.py                                          # the tiny world, three schedules, a table at the end
    python grpo.py --model tiny-vl                          # the same for a vision-language model on drawn scenes
    python grpo.py --algorithm gspo --schedule two-phase 0:0,0.3:1,0.3:0       # a schedule of one's own, as tau:rho points
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
from prefix import (PRECISIONS, SOURCES, Decoder, Palette, Sampling, add_sampling_flags, check_prompts,
                    completion_logprobs, end_ids, micro_batches, prompt_of, texts_of, whole)
from rewards import PROMPT_STYLES, REWARDS, TASKS, load_task, overlong, reward_weights, stop_strings
from sft import (Ranks, Run, apply_gradients, autocast, by_part, load_reference, load_trainable, make_optimizer, means,
                 rows_of_step, seed_of, set_learning_rate)
from vae import VAE, add_flags, check_traces, run_main

# What tells the algorithms apart: the defaults of six flags, for advantages, set_weights, policy_loss and collect. In a first
# update, where every ratio is 1, the gradient of gspo is that of grpo, and dr-grpo's is rloo's times (G - 1) / G.
PRESETS = ("advantage", "mean_over", "ratio", "clip_low", "clip_high", "resample")
ALGORITHMS = {"grpo": ("mean-std", "sequence", "token", 0.2, 0.2, 0),               # arXiv 2402.03300
              "rloo": ("leave-one-out", "constant", "token", 0.2, 0.2, 0),          # 2402.14740 sums over tokens; ours / constant
              "dr-grpo": ("mean", "constant", "token", 0.2, 0.2, 0),                # 2503.20783
              "dapo": ("mean-std", "token", "token", 0.2, 0.28, 2),                 # 2503.14476; and --reward ... overlong=1
              "gspo": ("mean-std", "sequence", "sequence", 3e-4, 4e-4, 0)}          # 2507.18071

# ---- the share of guided rollouts (Eq. 12) ------------------------------------------------------------------------------

# rho(tau) as points tau:rho, linear between them, level beyond; at a repeated tau it jumps, to the later point's rho.
SCHEDULES = {"none": "0:0", "constant": "0:1", "two-phase": "0:1,0.5:1,0.5:0", "linear": "0:1,1:0"}


def points_of(schedule):
    """The points of a schedule, named or written out: "0:1,1:0" -> [(0, 1), (1, 0)]. ValueError if it cannot be one."""
    try:
        points = [tuple(map(float, point.split(":", 1))) for point in SCHEDULES.get(schedule, schedule).split(",")]
        if all(0 <= tau <= 1 and 0 <= rho <= 1 for tau, rho in points) and points == sorted(points, key=lambda x: x[0]):
            return points
    except ValueError:                                      # not numbers, or not two: none of them, either
        pass
    raise ValueError(f"--schedule '{schedule}' is none of {', '.join(SCHEDULES)}, nor points tau:rho between 0 and 1 of rising tau")


def rho_at(schedule, tau):
    """The share of each group that carries a prefix when the share tau of the training is done."""
    points = points_of(schedule)
    for (tau0, rho0), (tau1, rho1) in zip(points, points[1:]):
        if tau0 <= tau < tau1:
            return rho0 + (rho1 - rho0) * (tau - tau0) / (tau1 - tau0)
    return points[0][1] if tau < points[0][0] else points[-1][1]


def guided_count(rho, group, u):
    """rho * G rounded up or down by u, uniform in [0, 1): its mean is rho * G, which the nearest integer's is not."""
    return math.ceil(rho * group - u)


# ---- advantages and loss (Eq. 13, 14) -----------------------------------------------------------------------------------

def advantages(rewards, how):
    """rewards [P, G] -> advantages [P, G], each group (a row) against its own baseline (Eq. 13).

    mean-std: (r - mean) / (std + 1e-4), with the sample standard deviation. mean: r - mean. leave-one-out: r - mean of the
    *other* G - 1 rollouts, which is `mean` times G / (G - 1). Example: (1, 0, 0, 0) gives leave-one-out (1, -1/3, -1/3, -1/3).
    """
    group = rewards.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)
    if how == "mean-std":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    return centred * group / (group - 1) if how == "leave-one-out" else centred


# What policy_loss and update measure on each trained token; the first counts them, the others are logged as means.
TOKEN_METRICS = ("tokens", "clip_share", "log_ratio", "tis_weight", "kl", "entropy")


def policy_loss(logprobs, old, sampled, row, advantage, weight, ratio="token", clip_low=0.2, clip_high=0.2, tis=0.0,
                reference=None, kl=0.0):
    """PPO's clipped surrogate (Eq. 14) over all N tokens of R completions; token t belongs to completion row[t]:

        loss = sum_t weight * (-trust_t * min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + kl * k3_t)
        r_t = pi(o_t) / pi_old(o_t)                     ratio "sequence" (GSPO): these ratios' geometric mean over the completion
        trust_t = min(pi_old(o_t) / pi_sampler(o_t), tis)                               1 where tis is 0: no correction
        k3_t = x - log x - 1 with x = pi_ref(o_t) / pi(o_t)                             estimates KL(pi || pi_ref), never negative

    logprobs [N] (differentiable), old [N], sampled [N] and reference [N] or None are log-probs under pi, pi_old, pi_sampler and
    pi_ref; row [N]; advantage [R]; weight [R], shares of a *global* count, so that the losses of micro-batches and ranks add up.
    Returns (loss, statistics [N, 5] in the order of TOKEN_METRICS).
    """
    log_ratio, advantage = logprobs - old, advantage[row]                                               # [N], [N]
    if ratio == "sequence":
        log_ratio = (torch.zeros_like(weight).index_add(0, row, log_ratio) / row.bincount(minlength=len(weight)))[row]
    free, clipped = log_ratio.exp() * advantage, log_ratio.exp().clamp(1 - clip_low, 1 + clip_high) * advantage
    trust = (old - sampled).exp().clamp(max=tis) if tis else torch.ones_like(old)
    loss, k3 = -trust * torch.minimum(free, clipped), torch.zeros_like(old)
    if reference is not None:
        k3 = (reference - logprobs).exp() - (reference - logprobs) - 1
        loss = loss + kl * k3
    statistics = torch.stack([torch.ones_like(old), clipped < free, (logprobs - sampled).abs(), trust, k3], 1)
    return (loss * weight[row]).sum(), statistics.detach()


# ---- rollouts -----------------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One sampled answer. prefix [L, d] or None is what conditions it; latent [L or 1, k] is what rebuilds the prefix."""
    prompt: int                     # number in the step: 0 to P - 1; what replaces p in round n of resampling is p + n P
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
    weight: float = 0.0             # what each of its tokens counts in the loss; 0: nothing, it is masked
    old: list | None = None         # log-probs under pi_old, where they are not those it was sampled with (--tis)
    reference: list | None = None   # under the starting policy (--kl)

    guided = property(lambda self: self.prefix is not None)
    length = property(lambda self: len(self.prompt_ids) + len(self.completion_ids) + (len(self.prefix) if self.guided else 0))


def collect(decoder, tokenizer, task, palette, step, args, ranks):
    """G judged rollouts, with their advantages, for each of this rank's prompts of the step, group behind group.

    Dynamic sampling: a group without signal (equal rewards) is replaced by a fresh prompt's, at most --resample times. Rows and
    seeds of replacements are functions of (seed, step, number); every rank replaces its own.
    """
    asked = rows_of_step(task.train, step, args.prompts, args.seed, args.resample)
    groups, numbers = {}, list(ranks.own(range(args.prompts)))
    for _ in range(1 + args.resample):
        rollouts = roll_out(decoder, tokenizer, task, palette, step, {number: asked[number] for number in numbers}, args)
        set_advantages(rollouts, args)
        groups.update({number % args.prompts: rollouts[i * args.group:][:args.group] for i, number in enumerate(numbers)})
        numbers = [n + args.prompts for n in numbers if not any(r.advantage for r in groups[n % args.prompts])]
        if not numbers:
            break
    return [rollout for group in groups.values() for rollout in group]


def roll_out(decoder, tokenizer, task, palette, step, asked, args):
    """G judged rollouts of each row of `asked` (by its number in the step), the first few of each group under a prefix."""
    rho, jobs = rho_at(args.schedule, step / args.steps), []                # jobs: (number, rollout index, guided)
    for p in asked:                                                         # Eq. 12: a share rho of each group is guided
        guided = guided_count(rho, args.group, random.Random(seed_of(args.seed, "guided", step, p)).random())
        jobs += [(p, g, g < guided) for g in range(args.group)]
    draws = palette.draw([seed_of(args.seed, "latent", step, p, g if args.latent_per == "rollout" else 0) for p, g, _ in jobs])
    prefixes, latents = ([x if guided else None for x, (_, _, guided) in zip(drawn, jobs)] for drawn in draws)
    ids = {p: prompt_of(row, tokenizer, task.instruction, args.prompt) for p, row in asked.items()}
    completions = decoder.generate([ids[p] for p, _, _ in jobs], prefixes, Sampling.of(args),
                                   [seed_of(args.seed, "rollout", step, p, g) for p, g, _ in jobs])
    completions, texts = texts_of(completions, tokenizer, stop_strings(tokenizer, args.prompt))
    rollouts = []
    for (p, _, _), prefix, latent, c, text in zip(jobs, prefixes, latents, completions, texts):
        rewards = task.judge(text, asked[p]["answer"], c.finish)
        rewards["overlong"] = overlong(len(c.ids), args.max_new_tokens, args.max_new_tokens // 5)
        reward = sum(weight * rewards[name] for name, weight in args.reward.items())
        reward -= 1.0 if args.truncated == "penalise" and c.finish == "length" else 0.0
        rollouts.append(Rollout(p, ids[p], c.ids, c.logprobs, c.finish, prefix, latent, text, rewards, reward))
    return rollouts


def set_advantages(rollouts, args):
    """Fill in each rollout's advantage in its group, exactly 0 without signal: no backward pass for rounding errors."""
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, args.group)                           # [P, G]
    values = advantages(rewards, args.advantage).masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)
    for rollout, value in zip(rollouts, values.flatten().tolist()):
        rollout.advantage = value


# ---- one update ---------------------------------------------------------------------------------------------------------

def set_weights(rollouts, args, ranks):
    """Fill in what a token of each rollout counts in the loss: its share in what the rollouts of *all ranks* count.

    token: 1 / all tokens (DAPO). sequence: 1 / (its tokens x rollouts) (GRPO, GSPO). constant: 1 / (rollouts x longest possible
    completion) (Dr. GRPO). Groups without signal are counted. With --truncated mask a completion that the length limit cut off
    is not, and weighs 0; its reward still stands in its group's baseline (as in DAPO's filter).
    """
    kept = [r for r in rollouts if not (args.truncated == "mask" and r.finish == "length")]
    tokens, count = ranks.total([sum(len(r.completion_ids) for r in kept), len(kept)])
    for r in kept:
        shares = {"token": tokens, "sequence": len(r.completion_ids) * count, "constant": args.max_new_tokens * count}
        r.weight = 1.0 / shares[args.mean_over]


def score(model, rows, args, ranks, with_entropy=False):
    """Log-probs [N] and entropies [N] of all tokens of these rollouts, each under its own prefix, as they were sampled."""
    with autocast(ranks.device, args.precision):
        return completion_logprobs(model, [r.prompt_ids for r in rows], [r.completion_ids for r in rows], [r.prefix for r in rows],
                                   Sampling.of(args), with_entropy)


@torch.no_grad()
def remember(name, model, rollouts, args, ranks):
    """Fill in rollouts' log-probs under a model: as `reference`; or as `old`, before the first of several updates moves pi."""
    live = [r for r in rollouts if r.advantage or args.kl]
    for group in ranks.level(micro_batches([r.length for r in live], args.tokens_per_batch)):
        rows = [live[i] for i in group]
        found = score(model, rows, args, ranks)[0].split([len(r.completion_ids) for r in rows])
        for r, logprobs in zip(rows, found):
            setattr(r, name, logprobs.tolist())


def update(model, optimizer, rollouts, args, ranks):
    """One gradient step on this rank's rollouts. Returns its loss, the gradient norm, and the sums [2, 6] of TOKEN_METRICS.

    Rollouts without advantage have no gradient and cost no forward pass, unless a KL term wants them. With --tis pi_old has been
    remembered, or, where one update is all there is, it is what this very forward finds; else it is what was sampled from.
    """
    set_weights(rollouts, args, ranks)
    live = [r for r in rollouts if r.weight and (r.advantage or args.kl)]
    loss_sum, sums = 0.0, torch.zeros(2, len(TOKEN_METRICS), dtype=torch.float64)
    tensor = lambda values, dtype=None: torch.tensor(values, dtype=dtype, device=ranks.device)
    for group in ranks.level(micro_batches([r.length for r in live], args.tokens_per_batch)):
        rows = [live[i] for i in group]
        logprobs, entropy = score(model, rows, args, ranks, True)                                       # [N], [N]
        if not rows:                                        # under FSDP another rank has one micro-batch more: keep in step
            logprobs.sum().backward()
            continue
        row = tensor([i for i, r in enumerate(rows) for _ in r.completion_ids], dtype=torch.long)       # [N]
        sampled = tensor([x for r in rows for x in r.logprobs])                                         # [N]
        old = logprobs.detach() if args.tis and not rows[0].old else tensor([x for r in rows for x in r.old or r.logprobs])
        reference = tensor([x for r in rows for x in r.reference]) if args.kl else None                 # [N]
        advantage, weight = tensor([r.advantage for r in rows]), tensor([r.weight for r in rows])       # [R], [R]
        loss, statistics = policy_loss(logprobs, old, sampled, row, advantage, weight, args.ratio, args.clip_low, args.clip_high,
                                       args.tis, reference, args.kl)
        loss.backward()
        loss_sum += loss.item()
        sums += by_part(torch.cat([statistics, entropy[:, None]], 1), [r.guided for r in rows for _ in r.completion_ids])
    return {"loss": loss_sum, "gradient_norm": apply_gradients(model, [optimizer], ranks), "sums": sums}


# ---- the loop -----------------------------------------------------------------------------------------------------------

def train(model, tokenizer, task, palette, run, args, reference=None):
    """The RL loop: roll out, score, update; every --eval-every steps a greedy evaluation *without* prefix."""
    ranks, optimizer = run.ranks, make_optimizer(model, args.lr)
    start = run.restore(model, [optimizer])["step"]
    decoder = Decoder(model, end_ids(model, tokenizer), args.slots, dtype=PRECISIONS[args.rollout_precision])
    evaluated = lambda: evaluate.greedy_accuracy(decoder, tokenizer, task, args, ranks)
    if start == 0:
        accuracy = evaluated()
        run.keep_best(0, accuracy, model, tokenizer)
        run.log("metrics", {"step": 0, "eval_accuracy": accuracy})
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=run.folder.name, disable=not run.writes)
    for step in bar:
        began, lr = time.time(), set_learning_rate(optimizer, args, step)
        rollouts = collect(decoder, tokenizer, task, palette, step, args, ranks)
        rolled = time.time()
        decoder.refresh()                                   # its packed weights are not held over the update
        if args.kl:
            remember("reference", reference, rollouts, args, ranks)
        if args.tis and args.epochs * args.minibatches > 1:
            remember("old", model, rollouts, args, ranks)
        share = len(rollouts) // args.minibatches
        updates = [update(model, optimizer, rollouts[i:i + share], args, ranks)
                   for _ in range(args.epochs) for i in range(0, len(rollouts), share)]
        row = {"step": step + 1, "rho": rho_at(args.schedule, step / args.steps), **summary(rollouts, updates, args, ranks),
               "lr": lr, "seconds_rollout": round(rolled - began, 3), "seconds": round(time.time() - began, 3)}
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            row["eval_accuracy"] = evaluated()
            run.keep_best(step + 1, row["eval_accuracy"], model, tokenizer)
        shown = ("rho", "reward_guided", "reward_unguided", "entropy", "kl", "clip_share", "eval_accuracy")
        bar.set_postfix({name: row[name] for name in shown if row.get(name) is not None},
                        tokens_s=row["rollouts"] * row["length"] / max(row["seconds"], 1e-3))
        run.log("metrics", row)
        kept = rollouts[::args.group] + rollouts[args.group - 1::args.group]       # each group's first (guided, if any) and last
        run.log("samples", *[sample_row(r, step + 1, palette.source) for r in kept])
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            run.save(step + 1, model, [optimizer])
    run.finish(model, tokenizer)


def summary(rollouts, updates, args, ranks):
    """One row of metrics over all ranks: means over rollouts and over trained tokens, guided and unguided apart as well."""
    values = [[1, r.reward, r.advantage, len(r.completion_ids), r.finish == "stop", *r.rewards.values()] for r in rollouts]
    rolled = by_part(torch.tensor(values, dtype=torch.float64), [r.guided for r in rollouts])
    groups = [rollouts[i:i + args.group] for i in range(0, len(rollouts), args.group)]
    loss, count, silent, resampled = ranks.total([
        sum(u["loss"] for u in updates) / len(updates), len(groups), sum(not any(r.advantage for r in group) for group in groups),
        sum(group[0].prompt // args.prompts for group in groups)])          # the round a group is from
    return {**means(("rollouts", "reward", "advantage", "length", "stopped", *rollouts[0].rewards), rolled, ranks), "loss": loss,
            **means(TOKEN_METRICS, sum(u["sums"] for u in updates), ranks),
            "log_ratio_start": means(TOKEN_METRICS, updates[0]["sums"], ranks)["log_ratio"],
            "gradient_norm": sum(u["gradient_norm"] for u in updates) / len(updates),
            "groups": int(count), "groups_without_signal": int(silent), "groups_resampled": int(resampled)}


def sample_row(rollout, step, source):
    """What samples.jsonl keeps of a rollout: enough to read it, and to rebuild its prefix."""
    return {"step": step, "prompt": rollout.prompt, "prompt_ids": rollout.prompt_ids, "completion": rollout.text,
            **rollout.rewards, "reward": rollout.reward, "advantage": rollout.advantage, "finish": rollout.finish,
            "prefix": source if rollout.guided else "none", "latent": None if rollout.latent is None else rollout.latent.tolist()}


# ---- command line -------------------------------------------------------------------------------------------------------

# Defaults of a real model, whose weights want far smaller steps than the tiny world's.
REAL = dict(schedule=["two-phase"], lr=1e-6, sft_lr=1e-5, steps=200, max_new_tokens=512, eval_questions=128, out="runs/real",
            tokens_per_batch=8192)
DEFAULTS = {"tiny": {}, "tiny-vl": dict(task="tiny-vl", max_new_tokens=14, base_steps=400, out="runs/tiny-vl")}
# What does not change a run's result, and so may differ when it is resumed.
NOT_RESULTS = (*sft.NOT_RESULTS, *sft.STAGE_FLAGS, "slots", "arms", "arm_questions", "arm_samples")


def add_all_flags(parser):
    """Every flag; defaults are the tiny world's and GRPO's, DEFAULTS, REAL and ALGORITHMS have the others'."""
    add_flags(parser, "model and data",
              model=("tiny", "hub name, folder, tiny or tiny-vl"),
              task=("tiny", f"{TASKS}, or a name for your own data"),
              train_data=(str, "JSONL of {question, answer} or hub:DATASET:CONFIG:SPLIT (default: the task's own)"),
              test_data=(str, "the same for the evaluation on the way (default: the task's own)"),
              prompt=("auto", "prompt format", PROMPT_STYLES), max_prompt=(1024, "longest prompt allowed, in tokens", 1),
              out=("runs/tiny", "folder of all stages"))
    add_flags(parser, "injection",
              schedule=(["none", "two-phase", "linear"], f"one run each: {', '.join(SCHEDULES)}, or points tau:rho as in "
                        "0:1,0.5:1,0.5:0,1:0 with a jump at 0.5", "RHO"),
              source=("prior", f"of prefixes: {', '.join(SOURCES)} or a domain"),
              length=(8, "prefix rows L", 0), independent=(False, "L independent latents instead of one tiled"),
              latent_per=("rollout", "one z each", ("rollout", "prompt")))
    add_flags(parser, "reward and loss",
              reward=(["accuracy=1"], f"the reward is their weighted sum; names: {', '.join(REWARDS)}", "NAME=WEIGHT"),
              truncated=("keep", "completions that the length limit cut off: train on them, leave them out of the loss, or take 1 "
                         "off their reward", ("keep", "mask", "penalise")),
              algorithm=("grpo", "sets the defaults of the next six flags", tuple(ALGORITHMS)),
              advantage=(str, "baseline and scale (default: %(default)s)", ("mean-std", "mean", "leave-one-out")),
              mean_over=(str, "what the loss is a mean over (default: %(default)s)", ("sequence", "token", "constant")),
              ratio=(str, "importance ratio of each token or completion (default: %(default)s)", ("token", "sequence")),
              clip_low=(float, "PPO clip below 1 (default: %(default)s)", 0),
              clip_high=(float, "PPO clip above 1 (default: %(default)s)", 0),
              resample=(int, "fresh prompts tried in place of one without signal (default: %(default)s)", 0),
              tis=(0.0, "weigh tokens by min(pi_old / pi_sampler, TIS); 0: off", 0),
              kl=(0.0, "weight of the KL to the starting policy; 0: none is held", 0))
    add_flags(parser, "training",
              steps=(60, "batches of rollouts", 1), prompts=(8, "prompts per step, over all ranks", 1),
              group=(8, "rollouts per prompt G, which are compared", 2),
              epochs=(1, "passes over each batch of rollouts", 1), minibatches=(1, "updates per pass", 1),
              lr=(4e-4, "AdamW's learning rate", 0), seed=([0], "RL seeds, one run each"))
    add_sampling_flags(parser, max_new_tokens=34)
    evaluate.add_progress_flags(parser)
    sft.add_stage_flags(parser)
    sft.add_machine_flags(parser, tokens_per_batch=1024, save_every=20)


def parse_args(argv=None):
    """The flags; --model and --algorithm change the defaults of others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    add_all_flags(parser)
    known = parser.parse_known_args(argv)[0]                # before there is a --help, which would end it here
    parser.add_argument("-h", "--help", action="help", help="show this message and exit; the defaults are those of --model")
    parser.set_defaults(**DEFAULTS.get(known.model, REAL), **dict(zip(PRESETS, ALGORITHMS[known.algorithm])))
    args = parser.parse_args(argv)
    args.reward = reward_weights(args.reward)
    return args


def check(args):
    """ValueError, before any work, for flags that together would fail after an hour or train on nothing."""
    unguided = args.source == "none" or args.length == 0
    twice = [flag for flag in ("schedule", "seed") if len(set(getattr(args, flag))) < len(getattr(args, flag))]
    for wrong, why in (
            (args.temperature == 0, "--temperature must be above 0 for rollouts: greedy ones are all the same and teach nothing"),
            (0 < args.tis < 1, f"--tis must be 0 (off) or at least 1, not {args.tis}: it caps a weight of about 1"),
            (not (args.traces or args.model in DEFAULTS), "--traces is needed to train the VAE and warm up a model of your own"),
            (unguided and args.schedule != ["none"], "--source none or --length 0 injects nothing: use --schedule none"),
            (twice, f"--{' and --'.join(twice)} names a run twice")):
        if wrong:
            raise ValueError(why)
    for schedule in args.schedule:
        points_of(schedule)
    Sampling.of(args)
    check_traces(args.traces, args.limit)
    evaluate.check_names(args)


def runs_of(args):
    """(arguments, folder, settings) of every run: each schedule with each seed."""
    for schedule in args.schedule:
        name = schedule if schedule in SCHEDULES else "rho" + schedule.replace(":", "=").replace(",", "_")
        name += "" if args.source == "prior" or schedule == "none" else f"-{args.source}"
        for seed in args.seed:
            own = argparse.Namespace(**{**vars(args), "schedule": schedule, "seed": seed})
            settings = {flag: value for flag, value in vars(own).items() if flag not in NOT_RESULTS}
            yield own, Path(args.out) / f"{args.algorithm}-{name}-s{seed}", settings


def main(argv=None):
    """All stages: what is missing below RL, one RL run per schedule and seed, tables and pictures."""
    args = parse_args(argv)
    check(args)
    ranks, task = Ranks.start(args.device, args.fsdp), load_task(args.task, args.train_data, args.test_data)
    if args.prompts % (ranks.world * args.minibatches):
        raise ValueError(f"--prompts {args.prompts} cannot be split over {ranks.world} ranks x {args.minibatches} minibatches")
    check_prompts(task.train + task.test[:max(args.eval_questions, args.arm_questions)], task.instruction, args)
    for _, folder, settings in runs_of(args):               # all of them are checked before any work
        if (folder / "config.json").is_file() and not args.overwrite:
            sft.is_finished(folder, settings, args.resume)
    policies, folders = sft.prepare(args, ranks), {}
    evaluate.check_names(args)
    for own, folder, settings in runs_of(args):
        run = Run(folder, settings, ranks, args.resume, args.overwrite, args.keep)
        folders.setdefault(own.schedule, []).append(folder)
        if not run.finished:
            train_one(own, task, run, policies[own.schedule])
        elif ranks.rank == 0:
            print(f"using {folder}")
    ranks.leave()                                           # the others end here
    if ranks.rank == 0:
        evaluate.close_rl(args, folders, policies, ranks.device)


def train_one(args, task, run, start):
    """One RL run from the warmed-up policy in the folder `start`."""
    model, tokenizer = load_trainable(start, run.ranks, args)
    reference = load_reference(start, model, run.ranks, args) if args.kl else None
    source = "none" if args.schedule == "none" else args.source
    latents = None if source in ("none", "noise") else VAE.load(args.vae)
    palette = Palette(latents, whole(model.get_input_embeddings().weight.detach()), source, args.length, not args.independent)
    train(model, tokenizer, task, palette, run, args, reference)


if __name__ == "__main__":
    run_main(main, "grpo.py")
