"""GRPO with latent injection (Sec. 3.4, Eq. 12-14): part of every group of rollouts reasons under a sampled prefix.

One step: collect() rolls out and judges, a share rho(tau) of each group under a prefix, and compares the rollouts of a group;
update() takes a gradient step on policy_loss(). train() repeats the two. How it departs from the GRPO paper, and from
Reasoning Palette where that leaves things open:
  1. Guided and unguided rollouts share one group baseline (Eq. 12, 13). rho * G is rounded at random so that it is right on
     average; every guided rollout draws its own z (the paper draws one per prompt: --latent-per prompt), because a group
     that shares one strategy cannot compare strategies.
  2. The log-probs in the loss are conditioned on the same prefix that was sampled under (Eq. 14), at the same temperature
     and with the same filters. pi_old is what the decoder sampled from: no second forward pass makes it (log_ratio_start in
     the metrics says how far decoder and training forward differ; --tis corrects it where it is much).
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
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import sft
import vae as vae_stage
from prefix import (SOURCES, Decoder, Palette, Sampling, completion_logprobs, end_ids, load_tokenizer, micro_batches, prompt_of,
                    texts_of, whole)
from rewards import PROMPT_STYLES, STYLES_OF, TASKS, load_task, overlong, stop_strings
from sft import Ranks, Run, apply_gradients, autocast, load_trainable, make_optimizer, seed_of, set_learning_rate
from vae import require_positive, run_main

# What tells the algorithms apart: the defaults of six flags. advantage: see advantages(); mean_over: see set_weights();
# ratio, clip_low, clip_high: see policy_loss(); resample: see collect(). In a first update, where every ratio is 1, the gradient
# of gspo is that of grpo, and dr-grpo's is rloo's times (G - 1) / G: they part with --epochs or --minibatches above 1.
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
        right = all(0 <= tau <= 1 and 0 <= rho <= 1 for tau, rho in points) and points == sorted(points, key=lambda p: p[0])
    except ValueError:                                      # not numbers, or not two
        right = False
    if not right:
        raise ValueError(f"--schedule '{schedule}' is none of {', '.join(SCHEDULES)}, nor points tau:rho between 0 and 1 with "
                         "rising tau, as in 0:1,0.5:1,0.5:0,1:0")
    return points


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
    weight: float = 0.0             # what each of its tokens counts in the loss
    old: list | None = None         # log-probs under pi_old, where that is not what it was sampled from (--tis)

    guided = property(lambda self: self.prefix is not None)
    length = property(lambda self: len(self.prompt_ids) + len(self.completion_ids) + (len(self.prefix) if self.guided else 0))


def rows_of_step(task, step, prompts, seed, extra=0):
    """The step's rows of the training set: every row once an epoch, each epoch in an order of its own.

    extra * prompts replacements follow: the set's other rows, in an order of the step's own. So a step asks no question twice,
    unless the set has fewer than (1 + extra) * prompts.
    """
    count, start = len(task.train), step * prompts
    first = start // count
    epochs = range(first, (start + prompts - 1) // count + 1)
    order = [i for epoch in epochs for i in random.Random(seed_of(seed, "epoch", epoch)).sample(range(count), count)]
    rows = order[start - first * count:][:prompts]
    others = (sorted(set(range(count)) - set(rows)) or rows) if extra else []
    random.Random(seed_of(seed, "replacements", step)).shuffle(others)
    return [task.train[i] for i in rows + [others[i % len(others)] for i in range(extra * prompts)]]


def sampling_of(args):
    return Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_new_tokens=args.max_new_tokens)


def collect(decoder, tokenizer, task, palette, step, args, ranks):
    """G judged rollouts, with their advantages, for each of this rank's prompts of the step, group behind group.

    Dynamic sampling: a group without signal (equal rewards) is replaced by a fresh prompt's, at most --resample times. Row
    and seeds of a replacement are functions of (seed, step, its number), and every rank replaces its own: nothing is shared.
    """
    asked = rows_of_step(task, step, args.prompts, args.seed, args.resample)
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
    for p in asked:
        guided = guided_count(rho, args.group, random.Random(seed_of(args.seed, "guided", step, p)).random())
        jobs += [(p, g, g < guided) for g in range(args.group)]
    latent_seeds = [seed_of(args.seed, "latent", step, p, g if args.latent_per == "rollout" else 0) for p, g, _ in jobs]
    prefixes, latents = palette.draw(latent_seeds)
    prefixes = [prefix if guided else None for prefix, (_, _, guided) in zip(prefixes, jobs)]
    ids = {p: prompt_of(row, tokenizer, task.instruction, args.prompt) for p, row in asked.items()}
    completions = decoder.generate([ids[p] for p, _, _ in jobs], prefixes, sampling_of(args),
                                   [seed_of(args.seed, "rollout", step, p, g) for p, g, _ in jobs])
    completions, texts = texts_of(completions, tokenizer, stop_strings(tokenizer, args.prompt))
    rollouts = []
    for (p, _, guided), prefix, latent, c, text in zip(jobs, prefixes, latents, completions, texts):
        rewards = task.judge(text, asked[p]["answer"], c.finish)
        rewards["overlong"] = overlong(len(c.ids), args.max_new_tokens, args.max_new_tokens // 5)
        reward = sum(weight * rewards[name] for name, weight in args.reward.items())
        reward -= 1.0 if args.truncated == "penalise" and c.finish == "length" else 0.0
        latent = latent if guided else None
        rollouts.append(Rollout(p, ids[p], c.ids, c.logprobs, c.finish, prefix, latent, text, rewards, reward))
    return rollouts


def check_prompts(task, tokenizer, args):
    """Raises ValueError for a question whose prompt is over --max-prompt: before the run, not when its turn comes."""
    for row in task.train + task.test[:args.eval_questions]:
        length = len(prompt_of(row, tokenizer, task.instruction, args.prompt))
        if length > args.max_prompt:
            raise ValueError(f"a prompt of {length} tokens is over --max-prompt {args.max_prompt}: raise it, or drop the "
                             f"question {row['question'][:80]!r}")


def set_advantages(rollouts, args):
    """Fill in each rollout's advantage in its group, exactly 0 without signal: no backward pass for rounding errors."""
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, args.group)                           # [P, G]
    values = advantages(rewards, args.advantage).masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)
    for rollout, value in zip(rollouts, values.flatten().tolist()):
        rollout.advantage = value


# ---- one update ---------------------------------------------------------------------------------------------------------

def set_weights(rollouts, args, ranks):
    """Fill in what a token of each rollout counts in the loss: its share in what the rollouts of *all ranks* count.

    token: 1 / all tokens (DAPO). sequence: 1 / (its rollout's tokens x rollouts) (GRPO, GSPO). constant: 1 / (rollouts x the
    longest possible completion) (Dr. GRPO). Groups without signal are counted. With --truncated mask a completion that the
    length limit cut off is not, and weighs 0; its reward still stands in its group's baseline (as in DAPO's filter).
    """
    kept = [r for r in rollouts if not (args.truncated == "mask" and r.finish == "length")]
    tokens, count = ranks.total([sum(len(r.completion_ids) for r in kept), len(kept)])
    per = {"token": lambda n: tokens, "sequence": lambda n: n * count, "constant": lambda n: count * args.max_new_tokens}
    for r in rollouts:
        r.weight = 0.0
    for r in kept:
        r.weight = 1.0 / per[args.mean_over](len(r.completion_ids))


def inputs_of(rows, args):
    """What completion_logprobs needs to score rollouts as they were sampled."""
    return [r.prompt_ids for r in rows], [r.completion_ids for r in rows], [r.prefix for r in rows], sampling_of(args)


@torch.no_grad()
def remember_old(model, rollouts, args, ranks):
    """--tis: fill in pi_old by training's forward. Only where the first of several minibatches would move pi before the
    others have met it: their ratio would start at 1 whatever has changed, and the clip would never bind."""
    live = [r for r in rollouts if r.advantage or args.kl]
    for group in ranks.level(micro_batches([r.length for r in live], args.tokens_per_batch)):
        rows = [live[i] for i in group]
        with autocast(ranks.device, args.precision):
            logprobs, _ = completion_logprobs(model, *inputs_of(rows, args), with_entropy=False)
        for r, own in zip(rows, logprobs.split([len(r.completion_ids) for r in rows])):
            r.old = own.tolist()


def update(model, optimizer, reference, rollouts, args, ranks):
    """One gradient step on this rank's rollouts. Returns its loss, the gradient norm, and the sums [2, 6] of TOKEN_METRICS.

    Rollouts without advantage have no gradient and cost no forward pass, unless a KL term wants them. With --tis, pi_old is
    the policy by training's own forward, which the first update makes anyway (before several minibatches: remember_old).
    """
    set_weights(rollouts, args, ranks)
    live = [r for r in rollouts if r.weight and (r.advantage or reference is not None)]
    loss_sum, sums = 0.0, torch.zeros(2, len(TOKEN_METRICS), dtype=torch.float64)
    tensor = partial(torch.tensor, device=ranks.device)
    for group in ranks.level(micro_batches([r.length for r in live], args.tokens_per_batch)):
        rows = [live[i] for i in group]
        batch = inputs_of(rows, args)
        with autocast(ranks.device, args.precision):
            logprobs, entropy = completion_logprobs(model, *batch)                                      # [N], [N]
            with torch.no_grad():
                anchor = None if reference is None else completion_logprobs(reference, *batch, with_entropy=False)[0]
        if not rows:                                        # under FSDP another rank has one micro-batch more: keep in step
            logprobs.sum().backward()
            continue
        row = tensor([i for i, r in enumerate(rows) for _ in r.completion_ids], dtype=torch.long)       # [N]
        for i, r in enumerate(rows):
            r.old = r.old or (logprobs.detach()[row == i].tolist() if args.tis else r.logprobs)
        old, sampled = tensor([x for r in rows for x in r.old]), tensor([x for r in rows for x in r.logprobs])      # [N], [N]
        advantage, weight = tensor([r.advantage for r in rows]), tensor([r.weight for r in rows])       # [R], [R]
        loss, statistics = policy_loss(logprobs, old, sampled, row, advantage, weight, args.ratio, args.clip_low, args.clip_high,
                                       args.tis, anchor, args.kl)
        loss.backward()
        loss_sum += loss.item()
        sums += by_part(torch.cat([statistics, entropy[:, None]], 1), [r.guided for r in rows for _ in r.completion_ids])
    return {"loss": loss_sum, "gradient_norm": apply_gradients(model, [optimizer], ranks), "sums": sums}


def by_part(values, guided):
    """values [N, K] and N truth values -> the sums [2, K] over unguided and over guided items, in double precision."""
    values, guided = values.cpu().double(), torch.tensor(guided, dtype=torch.bool)
    return torch.stack([values[~guided].sum(0), values[guided].sum(0)])


# ---- the loop -----------------------------------------------------------------------------------------------------------

def train(model, tokenizer, task, palette, run, args, reference=None):
    """The RL loop: roll out, score, update; every --eval-every steps a greedy evaluation *without* prefix."""
    ranks, optimizer = run.ranks, make_optimizer(model, args.lr)
    state = run.restore(model, [optimizer])
    decoder = Decoder(model, end_ids(model, tokenizer), args.slots, dtype=PRECISIONS[args.rollout_precision])
    evaluated = lambda: evaluate.greedy_accuracy(decoder, tokenizer, task, args, ranks)
    if state["step"] == 0:
        run.log("metrics", {"step": 0, "eval_accuracy": evaluated()})
    bar = tqdm(range(state["step"], args.steps), initial=state["step"], total=args.steps, desc=run.folder.name,
               disable=not run.writes)
    for step in bar:
        began = time.time()
        set_learning_rate(optimizer, args, step)
        rollouts = collect(decoder, tokenizer, task, palette, step, args, ranks)
        rolled = time.time()
        decoder.refresh()                                   # its packed weights are not held over the update
        share = args.prompts // args.minibatches // ranks.world * args.group
        if args.tis and args.minibatches > 1:
            remember_old(model, rollouts, args, ranks)
        updates = [update(model, optimizer, reference, rollouts[start:start + share], args, ranks)
                   for _ in range(args.epochs) for start in range(0, len(rollouts), share)]
        row = {"step": step + 1, "rho": rho_at(args.schedule, step / args.steps), **summary(rollouts, updates, args, ranks),
               "seconds_rollout": round(rolled - began, 3), "seconds": round(time.time() - began, 3)}
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


def means(names, sums, ranks):
    """sums [2, K] over this rank's unguided and guided items, the first their number -> means over all ranks, by name."""
    (unguided, guided), row = ranks.total(sums.tolist()), {}
    for part, (count, *values) in (("", map(sum, zip(unguided, guided))), ("_guided", guided), ("_unguided", unguided)):
        row[names[0] + part] = int(count)
        row.update({name + part: value / count if count else None for name, value in zip(names[1:], values)})
    return row


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
            "prefix": source if rollout.guided else "none",
            "latent": rollout.latent.tolist() if rollout.latent is not None else None}


# ---- the stages before it -----------------------------------------------------------------------------------------------

def prepare(args, ranks):
    """Build what is missing below RL, each with the command a user would type. Returns {prefix kind: policy folder}."""
    root, base, given = Path(args.out), args.model, args.vae
    if args.model in DEFAULTS:
        base = str(root / "base")
        stage(sft.main, ["pretrain", "--model", args.model, "--out", base, "--seed", str(args.base_seed), "--steps",
                         str(args.base_steps), "--resume"], "sft.py", ranks)
        args.traces = args.traces or [f"{base}/traces.jsonl"]
    common = ["--model", base, "--limit", str(args.limit), "--traces", *args.traces]
    args.vae = given or str(root / "vae")
    if not (given and Path(given, "config.json").is_file()):            # a VAE that you name is used as it is
        stage(vae_stage.main, ["--out", args.vae, *common], "vae.py", ranks, rank_0_only=True)
    policies = {}
    for kind in dict.fromkeys("none" if schedule == "none" else "prior" for schedule in args.schedules):
        folder = root / ("sft-none" if kind == "none" else "sft")
        stage(sft.main, ["--out", str(folder), "--vae", args.vae, "--prefix", kind, "--lr", str(args.sft_lr), "--batch",
                         str(args.sft_batch), *common, "--precision", args.precision, "--device", args.device, "--prompt",
                         "plain" if args.prompt == "few-shot" else args.prompt, "--resume",
                         *(["--fsdp"] if args.fsdp else []), *(["--checkpointing"] if args.checkpointing else [])],
              "sft.py", ranks)
        policies[kind] = str(folder / "policy")
    return policies


def stage(main_function, argv, script, ranks, rank_0_only=False):
    """Run another script's main. Where its result is there already it only compares the settings, and refuses others."""
    if ranks.rank == 0:
        print(f"python {script} {' '.join(argv)}", flush=True)
    try:
        if ranks.rank == 0 or not rank_0_only:
            main_function(argv)
    except ValueError as error:                             # --overwrite here is for the RL runs, not for what they start from
        raise ValueError(str(error).replace("--overwrite to replace it", f"replace it: python {script} ... --overwrite")) from None
    ranks.wait()


# ---- command line -------------------------------------------------------------------------------------------------------

# Defaults of a real model, whose weights want far smaller steps than the tiny world's.
REAL = dict(schedule=["two-phase"], lr=1e-6, sft_lr=1e-5, steps=200, max_new_tokens=512, eval_questions=128, out="runs/real",
            tokens_per_batch=8192)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULTS = {"tiny": {}, "tiny-vl": dict(task="tiny-vl", max_new_tokens=14, base_steps=400, out="runs/tiny-vl")}
REWARDS = ("accuracy", "answered", "format", "undecided", "overlong")         # what Task.judge and roll_out give, by name
# What does not change a run's result, and so may differ when it is resumed; the stages below RL have a config.json of their own.
NOT_RESULTS = (*sft.NOT_RESULTS, "schedules", "seeds", "slots", "arms", "arm_questions", "arm_samples", "base_seed", "base_steps",
               "sft_lr", "sft_batch", "limit", "vae", "traces")


def add_model_flags(parser):
    """Flags on data, injection, reward and loss; their defaults are the tiny world's, REAL and ALGORITHMS have the others'."""
    data = parser.add_argument_group("model and data").add_argument
    data("--model", default="tiny", help="hub name, folder, tiny or tiny-vl (default: tiny)")
    data("--vae", help="VAE folder (default: OUT/vae, trained if it is missing)")
    data("--traces", nargs="+", metavar="[DOMAIN=]SOURCE", help="for VAE and warm-up (default: the tiny world's)")
    data("--limit", type=int, default=2000, help="traces kept per source of your own (default: 2000)")
    data("--task", default="tiny", help=f"{TASKS}, or a name for your own data (default: the tiny model's own)")
    data("--train-data", help="JSONL of {question, answer} or hub:DATASET:CONFIG:SPLIT (default: the task's own)")
    data("--test-data", help="the same for the evaluation on the way (default: the task's own)")
    data("--prompt", choices=PROMPT_STYLES, default="auto", help="prompt format (default: auto)")
    data("--max-prompt", type=int, default=1024, help="longest prompt allowed, in tokens (default: 1024)")
    data("--out", default="runs/tiny", help="folder of all stages (default: %(default)s)")
    inject = parser.add_argument_group("injection").add_argument
    inject("--schedule", nargs="+", default=["none", "two-phase", "linear"], metavar="RHO", help="one run each: "
           f"{', '.join(SCHEDULES)}, or points tau:rho as in 0:1,0.5:1,0.5:0,1:0 with a jump at 0.5 (default: %(default)s)")
    inject("--source", default="prior", help=f"of prefixes: {', '.join(SOURCES)} or a domain (default: prior)")
    inject("--length", type=int, default=8, help="prefix rows L (default: 8)")
    inject("--independent", action="store_true", help="L independent latents instead of one tiled (default: tiled)")
    inject("--latent-per", choices=("rollout", "prompt"), default="rollout", help="one z each (default: rollout)")
    loss = parser.add_argument_group("reward and loss").add_argument
    loss("--reward", nargs="+", default=["accuracy=1"], metavar="NAME=WEIGHT",
         help=f"the reward is their weighted sum; names: {', '.join(REWARDS)} (default: accuracy=1)")
    loss("--truncated", choices=("keep", "mask", "penalise"), default="keep", help="completions cut off by the length limit: "
         "train on them, leave them out of the loss, or take 1 off their reward (default: keep)")
    loss("--algorithm", choices=list(ALGORITHMS), default="grpo", help="sets the defaults of the next six flags (default: grpo)")
    loss("--advantage", choices=("mean-std", "mean", "leave-one-out"), help="baseline and scale (default: %(default)s)")
    loss("--mean-over", choices=("sequence", "token", "constant"), help="what the loss is a mean over (default: %(default)s)")
    loss("--ratio", choices=("token", "sequence"), help="importance ratio of each token or completion (default: %(default)s)")
    loss("--clip-low", type=float, help="PPO clip below 1 (default: %(default)s)")
    loss("--clip-high", type=float, help="PPO clip above 1 (default: %(default)s)")
    loss("--resample", type=int, help="fresh prompts tried in place of one without signal (default: %(default)s)")
    loss("--tis", type=float, default=0.0, help="weigh tokens by min(pi_old / pi_sampler, TIS); 0: off (default: 0)")
    loss("--kl", type=float, default=0.0, help="weight of the KL to the starting policy (default: 0, none held)")


def add_training_flags(parser):
    """Flags on training, sampling and evaluation."""
    training = parser.add_argument_group("training").add_argument
    training("--steps", type=int, default=60, help="batches of rollouts (default: %(default)s)")
    training("--prompts", type=int, default=8, help="prompts per step, over all ranks (default: 8)")
    training("--group", type=int, default=8, help="rollouts per prompt G (default: 8)")
    training("--epochs", type=int, default=1, help="passes over each batch of rollouts (default: 1)")
    training("--minibatches", type=int, default=1, help="updates per pass (default: 1)")
    training("--lr", type=float, default=4e-4, help="AdamW's learning rate (default: %(default)s)")
    training("--sft-lr", type=float, default=3e-6, help="of the warm-up (default: %(default)s)")
    training("--sft-batch", type=int, default=64, help="rows per warm-up update (default: 64)")
    training("--seed", type=int, nargs="+", default=[0], help="RL seeds, one run each (default: 0)")
    training("--base-seed", type=int, default=0, help="seed of the tiny base model (default: 0)")
    training("--base-steps", type=int, default=900, help="pretraining steps of the tiny base model (default: 900)")
    sampling = parser.add_argument_group("sampling of rollouts").add_argument
    sampling("--temperature", type=float, default=1.0, help="of rollouts (default: 1)")
    sampling("--top-p", type=float, default=1.0, help="likeliest tokens kept, by their sum (default: 1, all)")
    sampling("--top-k", type=int, default=0, help="likeliest tokens kept, by number (default: 0, all)")
    sampling("--max-new-tokens", type=int, default=34, help="longest completion (default: %(default)s)")
    sampling("--slots", type=int, default=64, help="rows decoded at a time (default: 64)")
    sampling("--rollout-precision", choices=PRECISIONS, default="fp32", help="of the decoder's copy of the weights and of its "
             "cache; bf16 halves both, samples from a slightly other policy (see --tis), and evaluates, too (default: fp32)")
    measure = parser.add_argument_group("evaluation").add_argument
    measure("--eval-every", type=int, default=10, help="steps between greedy evaluations (default: 10)")
    measure("--eval-questions", type=int, default=256, help="test questions of these (default: %(default)s)")
    measure("--arms", nargs="+", default=["all"], help="arms of the table at the end, or none (default: all)")
    measure("--arm-questions", type=int, default=64, help="test questions of the arms (default: 64)")
    measure("--arm-samples", type=int, default=32, help="samples a question in every arm (default: 32)")


def parse_args(argv=None):
    """The flags; --model and --algorithm change the defaults of others. Status 2 and one sentence if they cannot be right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_training_flags(parser)
    sft.add_machine_flags(parser, tokens_per_batch=1024, save_every=20)
    argv = sys.argv[1:] if argv is None else argv
    known = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])[0]
    parser.set_defaults(**DEFAULTS.get(known.model, REAL), **dict(zip(PRESETS, ALGORITHMS[known.algorithm])))
    args = parser.parse_args(argv)
    args.schedules, args.seeds = args.schedule, args.seed
    if args.model in DEFAULTS and not args.traces:
        args.limit = 10**9
    require_positive(parser, args, "steps", "prompts", "epochs", "minibatches", "max_new_tokens", "max_prompt", "eval_every",
                     "eval_questions", "save_every", "slots", "tokens_per_batch", "arm_questions", "arm_samples", "sft_batch",
                     "limit", "base_steps")
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args):
    """Refuse, before any work, what would fail after an hour or train on nothing: ValueError."""
    def require(right, why):
        if not right:
            raise ValueError(why)

    for name in ("length", "resample", "lr", "sft_lr", "kl", "clip_low", "clip_high", "tis", "lr_warmup"):
        require(0 <= getattr(args, name) < math.inf, f"--{name.replace('_', '-')} must be 0 or more, not {getattr(args, name)}")
    require(args.group >= 2, f"--group must be at least 2, not {args.group}: the rollouts of one prompt are compared")
    require(args.temperature > 0, "--temperature must be above 0 for rollouts: greedy ones are all the same and teach nothing")
    require(args.tis == 0 or args.tis >= 1, f"--tis must be 0 (off) or at least 1, not {args.tis}: it caps a weight of about 1")
    require(args.model in DEFAULTS or args.traces, "--traces is needed to train the VAE and to warm up a model other than tiny")
    try:
        args.reward = {name: float(weight) for name, _, weight in (item.partition("=") for item in args.reward)}
    except ValueError:
        raise ValueError(f"--reward takes NAME=WEIGHT with a number as weight, not {' '.join(args.reward)}") from None
    for name, weight in args.reward.items():
        require(name in REWARDS, f"unknown reward '{name}': choose from {', '.join(REWARDS)}")
        require(math.isfinite(weight), f"--reward {name}={weight} is not a number to weigh by")
    for flag, values in (("schedule", args.schedules), ("seed", args.seeds)):
        require(len(set(values)) == len(values), f"--{flag} names {' '.join(map(str, values))}: each run once")
    domains = STYLES_OF.get(args.model) or [spec.partition("=")[0] for spec in args.traces if "=" in spec]
    if args.model in DEFAULTS or len(domains) == len(args.traces):                # else rows or VAE name the domains
        known = [*SOURCES, *domains]
        require(args.source in known, f"unknown --source '{args.source}': choose one of {', '.join(known)}")
        evaluate.arms_of(args.arms if args.arms != ["none"] else ["all"], domains, args.temperature)
    sampling_of(args)
    for schedule in args.schedules:
        points_of(schedule)


def main(argv=None):
    """All stages: what is missing below RL, one RL run per schedule and seed, tables and pictures."""
    args = parse_args(argv)
    ranks = Ranks.start(args.device, args.fsdp)
    task = load_task(args.task, args.train_data, args.test_data)
    if not task.train or not task.test:
        raise ValueError(f"the task '{args.task}' needs training and test rows: give --train-data and --test-data")
    if args.prompts % (ranks.world * args.minibatches):
        raise ValueError(f"--prompts {args.prompts} cannot be split over {ranks.world} ranks x {args.minibatches} minibatches")
    if args.model not in DEFAULTS:
        check_prompts(task, load_tokenizer(args.model), args)
    plan = []                                               # (schedule, seed, folder, config): checked before any work
    for args.schedule in args.schedules:
        name = args.schedule if args.schedule in SCHEDULES else "rho" + args.schedule.replace(":", "=").replace(",", "_")
        name += "" if args.source == "prior" or args.schedule == "none" else f"-{args.source}"
        for args.seed in args.seeds:
            folder = Path(args.out) / f"{args.algorithm}-{name}-s{args.seed}"
            config = {name: value for name, value in vars(args).items() if name not in NOT_RESULTS}
            plan.append((args.schedule, args.seed, folder, config))
            if (folder / "config.json").is_file() and not args.overwrite:
                sft.is_finished(folder, config, args.resume)
    policies, folders = prepare(args, ranks), {}
    for args.schedule, args.seed, folder, config in plan:
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
