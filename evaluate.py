"""Measuring what latents do: pass@k of several arms at an equal budget of samples, with controls, intervals and pictures.

An arm is a way to get n different answers to a question: sampling tokens, or greedy decoding under n different prefixes,
or both. Is a gain really from the latent? The controls tell:
  noise     a random prefix with the norm of real tokens: would any disturbance do?
  gauss     a prefix from a Gaussian fitted to mean-pooled embeddings: is the VAE needed?
  shuffled  latents of the domains with the entries of each z in random order: does the place in latent space matter? They keep
            the length and entries of z and lose the domain, so `follows` must fall to chance. (Our choice. z is drawn
            independently of the question, so dealing the latents out to other questions would change nothing.)
pass@k is the unbiased estimator of Chen et al. 2021; differences to a reference arm carry a paired bootstrap interval.

Departs from the paper: it evaluates each arm on its own benchmark and model and gives no intervals; here all arms see the same
questions, the same policy and the same number of samples.

Run it (writes results.json, results.md, samples.jsonl, pass_at_k.png into --out):
    python evaluate.py                                               # the tiny base model (made where it is missing)
    python evaluate.py --model tiny-vl                               # its vision-language sister: Table 2, with boxes.png
    python evaluate.py --model runs/tiny/sft --analyse               # after the warm-up; where in latent space it is right
    python evaluate.py --model runs/tiny/sft --sweep length=1,2,4,8 beta=0.5,1,4 temperature=0.5,1 --out runs/tiny/sweep
    python evaluate.py --model runs/qwen/sft --vae runs/qwen/vae --task gsm8k math --questions 64 --samples 8
    python evaluate.py --rescore --out runs/tiny/evaluation          # judge the stored answers again: no model is loaded
    python evaluate.py --curves runs/tiny/grpo-*                     # only draw the learning curves of runs
    python evaluate.py --reproduce                                   # the paper's figures and tables in miniature: one page
"""
import argparse
import base64
import copy
import functools
import html
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

import vae as vae_stage
from prefix import Decoder, Palette, Sampling, check_source, end_ids, load_policy, prompt_of, texts_of
from rewards import (PROMPT_STYLES, STYLES, STYLES_OF, TASKS, GroundingTask, answers_equal, load_task, parse_box,
                     stop_strings)
from sft import device_of, seed_of
from vae import (VAE, add_flags, as_flags, find_model, find_vae, open_image, pca, read_json, require_same, run_main,
                 write_text)

# ---- estimators ---------------------------------------------------------------------------------------------------------


def pass_at_k(n, correct, k):
    """Probability that at least one of k samples, drawn without replacement from n of which `correct` are right, is right.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, Eq. 1); unbiased for the pass@k of fresh samples. Needs 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a question, there are {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def vote(answers):
    """Groups equal answers (the verifier's equality; None is no answer): [(answer, votes)], most votes first."""
    groups = {}
    for answer, votes in Counter(answer for answer in answers if answer is not None).items():
        same = next((known for known in groups if answers_equal(answer, known) is True), answer)
        groups[same] = groups.get(same, 0) + votes
    return sorted(groups.items(), key=lambda group: -group[1])


def majority(votes, gold):
    """maj@n of what `vote` gives: 1.0 if the answer with most votes is right. A tie counts as the share of its answers that are
    right: what a fair draw between them would give on average, without the draw."""
    best = [answer for answer, count in votes if count == votes[0][1]]
    return sum(answers_equal(answer, gold) is True for answer in best) / len(best) if best else 0.0


def mean_and_error(*benchmarks):
    """Mean over benchmarks of the mean over questions, and its standard error. benchmarks: lists, one value a question."""
    values = [torch.tensor(benchmark, dtype=torch.float64) for benchmark in benchmarks]
    variance = sum((v.var() / len(v)).item() for v in values if len(v) > 1)
    return sum(v.mean().item() for v in values) / len(values), math.sqrt(variance) / len(values)


def bootstrap(*benchmarks, resamples=2000, seed=0):
    """(mean, low, high): mean_and_error's mean with its 95% percentile interval over questions drawn with replacement.

    Of differences between two arms, question by question, this is the paired bootstrap: what makes a question hard for both
    arms cancels. Questions are drawn within their benchmark.
    """
    generator, means = torch.Generator().manual_seed(seed), 0.0
    for benchmark in benchmarks:
        values = torch.tensor(benchmark, dtype=torch.float64)                                       # [Q]
        picks = torch.randint(len(values), (resamples, len(values)), generator=generator)           # [resamples, Q]
        means = means + values[picks].mean(1) / len(benchmarks)                                     # [resamples]
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return mean_and_error(*benchmarks)[0], low, high


# ---- answering questions ------------------------------------------------------------------------------------------------

Lab = namedtuple("Lab", "decoder tokenizer table vae")          # what every arm needs of the model; table: E [V, d]


def judged(task, text, gold, finish):
    """What is kept of a completion's judgement: the rewards by name, the answer found in it, and its style if the task knows."""
    return {**task.judge(text, gold, finish), "answer": task.extract(text, finish),
            **({"style": task.style(text)} if task.style else {})}


def prefix_seed(seed, question, number):
    """The seed of a sample's prefix: Palette.draw([it]) rebuilds the prefix and its z, so samples.jsonl need not hold them."""
    return seed_of(seed, "prefix", question, number)


def answer(decoder, tokenizer, task, rows, palette, sampling, samples, seed, prompt_style="auto", progress=None):
    """`samples` judged answers to each of `rows`, each under a prefix of its own if a palette is given.

    Seeds depend on the question's text (its id, if it has an image) and the sample's number alone, so neither the order of the
    questions nor a split over ranks changes an answer. Returns one dict a sample: row (its question's number), question (or id),
    gold, family where the row names one, domain where the latent comes from one, sample, completion, what `judged` keeps, finish,
    tokens.
    """
    jobs = [(number, row, s) for number, row in enumerate(rows) for s in range(samples)]
    prompts = [prompt_of(row, tokenizer, task.instruction, prompt_style) for row in rows]
    names = [row.get("id", row["question"]) for row in rows]                # different pictures may have the same question
    seeds = [prefix_seed(seed, names[number], s) for number, _, s in jobs]
    completions = decoder.generate([prompts[number] for number, _, _ in jobs], palette and palette.draw(seeds)[0], sampling,
                                   [seed_of(seed, "token", names[number], s) for number, _, s in jobs], progress)
    completions, texts = texts_of(completions, tokenizer, stop_strings(tokenizer, prompt_style))
    domains = [palette and palette.domain_of(seed) for seed in seeds]
    return [{"row": number, "question": names[number], "gold": row["answer"],
             **({"family": row["family"]} if "family" in row else {}), **({"domain": domain} if domain else {}), "sample": s,
             "completion": text, **judged(task, text, row["answer"], completion.finish), "finish": completion.finish,
             "tokens": len(completion.ids)}
            for (number, row, s), domain, completion, text in zip(jobs, domains, completions, texts)]


def greedy_accuracy(decoder, tokenizer, task, args, ranks):
    """Greedy pass@1 without prefix on the first --eval-questions test rows, over all ranks: grpo.py's progress evaluation."""
    rows = ranks.own(task.test[:args.eval_questions])
    samples = answer(decoder, tokenizer, task, rows, None, Sampling(0.0, max_new_tokens=args.max_new_tokens), 1, 0, args.prompt)
    right, count = ranks.total([sum(sample["accuracy"] for sample in samples), len(samples)])
    return right / max(count, 1)


def add_progress_flags(parser):
    """grpo.py's flags on greedy_accuracy, and on the arms of close_rl."""
    add_flags(parser, "evaluation",
              eval_every=(10, "steps between greedy evaluations", 1),
              eval_questions=(256, "test questions of these", 1),
              arms=(["all"], "arms of the table at the end, or none"),
              arm_questions=(64, "test questions of the arms", 1),
              arm_samples=(32, "samples a question in every arm", 1))


def arms_of(names, domains, temperature, with_vae=True):
    """{arm: (prefix source, temperature)}; names: "all", or some of them. Without a VAE four arms remain."""
    sources = {"noise": "noise", "gauss": "gauss", "shuffled": "shuffled", "latent": "prior"}
    arms = {"greedy": ("none", 0.0), "sampling": ("none", temperature), **{name: (s, 0.0) for name, s in sources.items()},
            **{f"{name} + sampling": (s, temperature) for name, s in sources.items() if name != "shuffled"},
            **{domain: (domain, 0.0) for domain in domains}}
    arms = {name: arm for name, arm in arms.items() if with_vae or arm[0] in ("none", "noise")}
    if names == ["all"]:
        return arms
    unknown = [name for name in names if name not in arms]
    if unknown:
        raise ValueError(f"unknown arm '{unknown[0]}': choose from {', '.join(arms)}, or all")
    return {name: arms[name] for name in names}


def check_names(args):
    """ValueError for a prefix source or an arm of grpo.py's flags that there is not, as far as the domains are known: those of
    the VAE, if it is there; else those that --traces names (if it names none, the rows do)."""
    vae, specs = Path(args.vae or Path(args.out, "vae")), args.traces or [f"{domain}=" for domain in STYLES_OF[args.model]]
    trained, domains = (vae / "config.json").is_file(), [spec.partition("=")[0] for spec in specs if "=" in spec]
    if trained or len(domains) == len(specs):
        domains = VAE.load(vae).domains if trained else domains
        check_source(args.source, domains)
        if args.arms != ["none"]:
            arms_of(args.arms, domains, args.temperature)


# What decides an answer; the other flags may differ when an evaluation is resumed.
SETTINGS = ("model", "vae", "task", "test_data", "prompt", "questions", "samples", "length", "independent", "temperature",
            "top_p", "top_k", "max_new_tokens", "dtype", "seed")


def settings_of(args):
    """What config.json keeps, and what an evaluation that goes on must share."""
    return {name: getattr(args, name) for name in SETTINGS}


def read_samples(out):
    """{benchmark: {arm: samples}} of samples.jsonl in the folder `out`; a torn last line, without end of line, is left out."""
    path, results = Path(out) / "samples.jsonl", {}
    for line in path.read_text().split("\n")[:-1] if path.is_file() else ():
        sample = json.loads(line)
        if not {"benchmark", "arm", "row"} <= sample.keys():
            raise ValueError(f"{path} was written by another version of evaluate.py: choose another --out")
        results.setdefault(sample.pop("benchmark"), {}).setdefault(sample.pop("arm"), []).append(sample)
    return results


def write_samples(out, results, add=False):
    """Replace samples.jsonl by `results` in one step, or add them at its end."""
    text = "".join(json.dumps({"benchmark": name, "arm": arm, **sample}) + "\n"
                   for name, arms in results.items() for arm, samples in arms.items() for sample in samples)
    if not add:
        return write_text(Path(out) / "samples.jsonl", text)
    with open(Path(out) / "samples.jsonl", "a") as file:
        file.write(text)


def finished_arms(args, tasks):
    """The complete arms that an interrupted evaluation of the same settings left in --out. Without --resume it starts anew, and
    the samples that are there are kept as samples.before.jsonl."""
    out, settings, results = Path(args.out), settings_of(args), {}
    out.mkdir(parents=True, exist_ok=True)
    if args.resume and (out / "config.json").is_file():
        require_same(f"{out} holds an evaluation", read_json(out / "config.json"), settings, "leave out --resume to start anew")
        asked = {task.name: [(row["question"], row["answer"]) for row in task.test[:args.questions]] for task in tasks}
        due = lambda name: [[pair for pair in asked[name] for _ in range(n)] for n in (1, args.samples)]     # 1: greedy
        results = {name: {arm: samples for arm, samples in arms.items()
                          if [(s.get("question"), s.get("gold")) for s in samples] in due(name)}
                   for name, arms in read_samples(out).items()}
    elif (out / "samples.jsonl").is_file():
        os.replace(out / "samples.jsonl", out / "samples.before.jsonl")
    write_samples(out, results)
    write_text(out / "config.json", json.dumps(settings, indent=1))
    return results


def run_arms(lab, tasks, args):
    """Answer --questions test rows of every task in every arm; samples.jsonl keeps them. Returns {benchmark: {arm: samples}}."""
    for task in tasks:
        if not task.test:
            raise ValueError(f"the task '{task.name}' has no test rows: give --test-data {task.name}=FILE")
    plan = {}                                               # all arms are set up before the first one runs: errors come early
    for arm, (source, temperature) in arms_of(args.arms, lab.vae.domains if lab.vae else (), args.temperature,
                                              lab.vae is not None).items():
        palette = Palette(lab.vae, lab.table, source, args.length, not args.independent) if source != "none" else None
        sampling = Sampling(temperature, args.top_p, args.top_k, max_new_tokens=args.max_new_tokens)
        plan[arm] = palette, sampling, 1 if palette is None and temperature == 0 else args.samples
    if args.against not in plan and args.against != "sampling":
        raise ValueError(f"--against {args.against} is not among the arms: {', '.join(plan)}")
    results = finished_arms(args, tasks)
    asked = {task.name: task.test[:args.questions] for task in tasks}
    total = sum(map(len, asked.values())) * sum(samples for _, _, samples in plan.values())
    with tqdm(total=total, desc="evaluate", unit="answer") as bar:
        for task, arm in itertools.product(tasks, plan):
            bar.set_postfix_str(f"{task.name}, {arm}")
            known = results.setdefault(task.name, {})
            if arm in known:
                bar.update(len(known[arm]))
                continue
            known[arm] = answer(lab.decoder, lab.tokenizer, task, asked[task.name], *plan[arm], args.seed, args.prompt,
                                bar.update)
            write_samples(args.out, {task.name: {arm: known[arm]}}, add=True)
    return {task.name: {arm: results[task.name][arm] for arm in plan} for task in tasks}


# ---- from answers to figures and tables ---------------------------------------------------------------------------------

def score(samples, ks):
    """One arm on one benchmark, question by question: {metric: [a value a question]}, the questions in the order of their rows.

    pass@k; majority (maj@n); answers: how many different ones; answered, undecided, style ...: shares; follows: the share whose
    style is the domain its latent comes from; tokens: mean length; samples: n. Greedy without prefix has one sample a question;
    more would be the same, so its pass@k is its pass@1.
    """
    questions, columns = {}, {}
    found = {s["style"] for s in samples if "style" in s}
    styles = next((names for names in STYLES_OF.values() if found & {*names}), STYLES)
    for sample in samples:
        questions.setdefault(sample["row"], []).append(sample)
    for _, group in sorted(questions.items()):
        n, right, answers = len(group), int(sum(s["accuracy"] for s in group)), vote(s["answer"] for s in group)
        row = {**{f"pass@{k}": pass_at_k(n, right, k if n > 1 else 1) for k in ks},
               "majority": majority(answers, group[0]["gold"]), "answers": len(answers), "samples": n,
               **{name: sum(s[name] for s in group) / n for name in ("answered", "undecided", "tokens")}}
        if "style" in group[0]:
            row.update({f"style {style}": sum(s["style"] == style for s in group) / n for style in styles})
            row.update({"follows": sum(s["style"] == s["domain"] for s in group) / n} if group[0].get("domain") in styles else {})
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def figures_of(scores, against):
    """scores: {arm: [its `score` on each benchmark]} -> {arm: {metric: (mean, standard error), ..., "difference": {...}}}.

    Benchmarks weigh the same, however many questions they have, as in the paper's Table 3. difference: {metric: bootstrap} to the
    arm `against`, paired by question, where that arm is there.
    """
    figures = {}
    for arm, benchmarks in scores.items():
        metrics = [name for name in benchmarks[0] if all(name in benchmark for benchmark in benchmarks)]
        figures[arm] = {name: mean_and_error(*(benchmark[name] for benchmark in benchmarks)) for name in metrics}
        if against in scores and arm != against:
            pairs = list(zip(benchmarks, scores[against]))
            figures[arm]["difference"] = {name: bootstrap(*([x - y for x, y in zip(a[name], b[name])] for a, b in pairs))
                                          for name in metrics if name.startswith("pass@") or name == "majority"}
    return figures


def all_figures(results, ks, against="sampling"):
    """{benchmark: figures_of}, of each of its families too ("tiny/list"), and "average" where there are several benchmarks."""
    figures, scores = {}, {}
    for name, arms in results.items():
        if not arms:
            raise ValueError(f"no arm is complete on {name}: let the evaluation run on with --resume")
        scores[name] = {arm: score(samples, ks) for arm, samples in arms.items()}
        figures[name] = figures_of({arm: [columns] for arm, columns in scores[name].items()}, against)
        families = dict(sorted((s["row"], s.get("family")) for s in next(iter(arms.values())))).values()       # of each question
        for family in dict.fromkeys(family for family in families if family):
            own = [this == family for this in families]
            figures[f"{name}/{family}"] = figures_of({arm: [{metric: [*itertools.compress(values, own)] for metric, values in
                                                             columns.items()}] for arm, columns in scores[name].items()}, against)
    common = [arm for arm in next(iter(scores.values())) if all(arm in benchmark for benchmark in scores.values())]
    if len(results) > 1 and common:
        figures["average"] = figures_of({arm: [benchmark[arm] for benchmark in scores.values()] for arm in common}, against)
    return figures


def powers(n):
    """1, 2, 4, ... up to n, and n itself."""
    return sorted({2 ** i for i in range(n.bit_length())} | {n})


def signed(difference):
    """A difference with its interval as text."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference) if difference else ""


def arms_table(figures, against, compare="pass@8"):
    """Rows of text, the head first: a few of each arm's figures, and the difference to the reference arm in `compare`."""
    first = next(iter(figures.values()))
    ks = [int(name[5:]) for name in first if name.startswith("pass@")]
    compare = compare if compare in first else f"pass@{max(ks)}"
    value = lambda name, digits: lambda row: f"{row[name][0]:.{digits}f}" if name in row else ""
    columns = {f"pass@{k}": value(f"pass@{k}", 3) for k in ks if k in (1, 8, max(ks))}
    if against in figures:
        columns[f"{compare} against {against} [95%]"] = lambda row: signed(row.get("difference", {}).get(compare))
    columns.update({"majority": value("majority", 3), "answers": value("answers", 1), "tokens": value("tokens", 1),
                    "no answer": lambda row: f"{1 - row['answered'][0]:.2f}", "undecided": value("undecided", 2)})
    styles = [name[6:] for name in first if name.startswith("style ")]
    if styles:
        columns[f"style {' / '.join(styles)}"] = lambda row: " / ".join(value(f"style {style}", 2)(row) for style in styles)
    if any("follows" in row for row in figures.values()):
        columns["follows domain"] = value("follows", 2)
    return [["arm", *columns], *([arm, *(cell(row) for cell in columns.values())] for arm, row in figures.items())]


def markdown(rows):
    """A table (rows of text, the head first) as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def save_results(args, results, note):
    """Score the samples and write results.json, results.md and the pictures. Returns {benchmark: {arm: figures}}."""
    out, figures = Path(args.out), all_figures(results, powers(args.samples), args.against)
    shown = {name: rows for name, rows in figures.items() if name in results or name == "average"}
    titles = ["" if len(shown) == 1 else f"{name}\n\n" for name in shown]
    text = "".join(f"{title}{markdown(arms_table(rows, args.against))}\n\n" for title, rows in zip(titles, shown.values())) + note
    arms = figures.get("average", figures[next(iter(results))])
    write_text(out / "results.json", json.dumps({"note": note, "arms": arms, "benchmarks": figures}, indent=1))
    write_text(out / "results.md", text + "\n")
    files = ["pass_at_k.png" if len(shown) == 1 else f"pass_at_k-{name.replace('/', '_')}.png" for name in shown]
    pictures = [draw_pass_at_k(rows, out / file) for rows, file in zip(shown.values(), files)]
    print(f"\n{text}\nsaved {out}{named(*pictures)}")
    return figures


def whole_arms(arms, samples):
    """{arm: samples} of a benchmark without the arm in which an evaluation was stopped: it lacks samples of some questions."""
    counts = {arm: Counter(sample["row"] for sample in own) for arm, own in arms.items()}       # {arm: {row: how many}}
    asked = set().union(*counts.values())
    return {arm: arms[arm] for arm, count in counts.items() if count.keys() == asked and {*count.values()} in ({1}, {samples})}


def rescore(args):
    """--rescore: judge the stored completions with today's rewards.py and make their tables and pictures anew. Loads no model."""
    out = Path(args.out)
    if not (out / "config.json").is_file() or not (out / "samples.jsonl").is_file():
        raise ValueError(f"no evaluation in {out}: --rescore needs the --out of an earlier one")
    vars(args).update(json.loads((out / "config.json").read_text()))
    results = read_samples(out)
    for name, arms in results.items():
        task = load_task(name, splits=())
        for sample in (sample for samples in arms.values() for sample in samples):
            sample.update(judged(task, sample["completion"], sample["gold"], sample["finish"]))
    write_samples(out, results)
    results = {name: whole_arms(arms, args.samples) for name, arms in results.items()}
    before = json.loads((out / "results.json").read_text())["note"] if (out / "results.json").is_file() else ""
    return save_results(args, results, before.split("; judged again")[0] + f"; judged again {date.today()}")


def metrics_of(folder):
    """The rows of an RL run's metrics.jsonl."""
    lines = (Path(folder) / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]        # behind the last end of line: nothing, or a row being written


def rl_figures(folders):
    """Greedy pass@1 without prefix over finished runs that differ in the seed: {start, end: by seed, mean and std of the ends,
    course: mean over all evaluations on the way, which is higher the sooner a run learns}."""
    points = [[row["eval_accuracy"] for row in metrics_of(folder) if "eval_accuracy" in row] for folder in folders]
    ends, course = [run[-1] for run in points], mean_and_error([mean_and_error(run)[0] for run in points])[0]
    spread = torch.tensor(ends).std().item() if len(ends) > 1 else 0.0
    return {"start": points[0][0], "end": ends, "mean": mean_and_error(ends)[0], "std": spread, "course": course}


def rl_rows(runs):
    """Rows of text, the head first. runs: {name: rl_figures}."""
    return [["run", "start", "end, by seed", "mean", "spread (std)", "mean over the run"]] + [
        [name, f"{row['start']:.3f}", ", ".join(f"{end:.3f}" for end in row["end"]), f"{row['mean']:.3f}", f"{row['std']:.3f}",
         f"{row['course']:.3f}"] for name, row in runs.items()]


def rl_table(root, name, folders):
    """The final greedy pass@1 without prefix of finished runs, {schedule: folders}, as NAME.json and Markdown (returned)."""
    runs = {schedule: rl_figures(paths) for schedule, paths in folders.items()}
    table = markdown(rl_rows({f"{name} {schedule}": row for schedule, row in runs.items()}))
    write_text(root / f"{name}.json", json.dumps(runs, indent=1))
    write_text(root / f"{name}.md", table + "\n")
    return table


def hardware(device):
    """One line on what the figures were measured on."""
    where = torch.cuda.get_device_name() if str(device).startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


# ---- sweeps, and where in latent space the right answers are ------------------------------------------------------------

def sweep(lab, tasks, args, note):
    """--sweep: the arms along one axis at a time, all else as the flags say; each point is an evaluation of its own under --out.

    Axes: length, temperature, top_p, and beta, for which a VAE like --vae, but for its beta, is trained into OUT/vae-beta-X.
    """
    out, points = Path(args.out), {}
    for axis, values in args.sweep.items():
        for value in values:
            point, vae = copy.copy(args), lab.vae
            point.out = str(out / f"{axis}-{value:g}")
            if axis == "beta":
                vae, point.vae = vae_with(args.vae, out / f"vae-beta-{value:g}", beta=value), str(out / f"vae-beta-{value:g}")
            else:
                setattr(point, axis, value)
            figures = all_figures(run_arms(lab._replace(vae=vae), tasks, point), powers(args.samples), args.against)
            points.setdefault(axis, {})[value] = figures.get("average", figures[tasks[0].name])
    rows = []
    for axis, values in points.items():
        for value, figures in values.items():
            head, *body = arms_table(figures, args.against)
            rows = rows or [["axis", "value", *head]]
            rows += [[axis, f"{value:g}", *row] for row in body]
    write_text(out / "sweep.json", json.dumps({"note": note(), "points": points, "table": rows}, indent=1))
    write_text(out / "sweep.md", f"{markdown(rows)}\n\n{note()}\n")
    print(f"\n{markdown(rows)}\n\n{note()}\nsaved {out}{named(draw_sweep(points, out / 'sweep.png'))}")


def vae_with(folder, out, **changed):
    """A VAE trained with the settings of the one in `folder`, but for those `changed`, kept in `out`."""
    settings = json.loads((Path(folder) / "config.json").read_text()).get("settings")
    if not settings:
        raise ValueError(f"{folder} does not say how it was trained: a sweep over beta needs a VAE made by vae.py")
    flags = [(f"--{name}", value if isinstance(value, list) else [value]) for name, value in {**settings, **changed}.items()]
    vae_stage.main([*(str(word) for flag, values in flags for word in (flag, *values)), "--out", str(out)])
    return VAE.load(out)


def halves(task, questions):
    """For each family of the task's questions, or the whole: (name, rows to learn from, rows kept aside), every other one."""
    rows, parts = task.test[:questions], []
    for family in dict.fromkeys(row.get("family") for row in rows):
        own = [number for number, row in enumerate(rows) if row.get("family") == family]
        if len(own) < 2:
            raise ValueError(f"--analyse needs at least two questions of {family or task.name}: raise --questions")
        parts.append((f"{task.name}/{family}" if family else task.name, set(own[::2]), set(own[1::2])))
    return parts


def analyse(lab, tasks, args, results):
    """--analyse: which region of latent space answers which questions, and does sampling z there help on *other* questions?

    Of each benchmark, or family where its questions have one, every other question is kept aside. From the rest come the z of
    the arm `latent` and whether each answer was right: a Gaussian of right z, the z whose neighbours were right most often, and
    the best domain. These answer the questions kept aside, against the prior.
    """
    table, maps, out = [], {}, Path(args.out)
    prior = Palette(lab.vae, lab.table, "prior", args.length)
    for task in tasks:
        rows = task.test[:args.questions]
        for name, seen, kept in halves(task, args.questions):
            pick = lambda arm, numbers: [s for s in results[task.name].get(arm, ()) if s["row"] in numbers]
            known = pick("latent", seen)
            z = torch.cat(prior.draw([prefix_seed(args.seed, s["question"], s["sample"]) for s in known])[1])      # [N, k]
            right = torch.tensor([s["accuracy"] for s in known])                                                   # [N]
            smooth = neighbourhood_mean(z, right)
            domain = max(lab.vae.domains, key=lambda name: sum(s["accuracy"] for s in pick(name, seen)))
            fitted = Palette(vae_of_right(lab.vae, z[right == 1]), lab.table, "right answers", args.length)
            best = Palette(lab.vae, lab.table, "prior", args.length, z=z[smooth.argmax()])
            ask = lambda palette, n: answer(lab.decoder, lab.tokenizer, task, [rows[i] for i in sorted(kept)], palette,
                                            Sampling(0.0, max_new_tokens=args.max_new_tokens), n, args.seed, args.prompt)
            arms = {"latent": pick("latent", kept), f"domain {domain}": pick(domain, kept),
                    "right answers": ask(fitted, args.samples), "best latent, one sample": ask(best, 1)}
            scores = {arm: [score(samples, powers(args.samples))] for arm, samples in arms.items() if samples}
            head, *body = arms_table(figures_of(scores, "latent"), "latent", "pass@1")
            table += [{"questions kept aside": f"{name} ({len(kept)})", **dict(zip(head, row))} for row in body]
            maps[name] = z, smooth
    columns = dict.fromkeys(column for row in table for column in row)                  # of one task some, of another others
    table = [[*columns], *([row.get(column, "") for column in columns] for row in table)]
    write_text(out / "analysis.json", json.dumps({"table": table}, indent=1))
    write_text(out / "analysis.md", markdown(table) + "\n")
    path = draw_reward_map(lab.vae, maps, out / "reward_map.png")
    print(f"\n{markdown(table)}" + (f"\npicture {path}" if path else ""))


def neighbourhood_mean(z, values, neighbours=32):
    """Mean of values [N] over the nearest latents of each z [N, k], itself among them: [N]."""
    near = [torch.cdist(part, z).topk(min(neighbours, len(z)), largest=False).indices for part in z.split(1024)]
    return values[torch.cat(near)].mean(1)                                                         # [N, neighbours] -> [N]


def vae_of_right(vae, z):
    """The VAE with one domain, "right answers": a Gaussian over z [N, k], drawn to the prior by k pseudo-counts (our choice)."""
    found, k = copy.deepcopy(vae), vae.latent
    mean = z.sum(0) / (len(z) + k)
    centred = z - mean
    covariance = (centred.T @ centred + k * torch.eye(k)) / (len(z) + k)
    found.domains, found.domain_mean = ["right answers"], mean[None]
    found.domain_factor = torch.linalg.cholesky(covariance).T[None]                                # eps @ A ~ N(0, A^T A)
    return found


# ---- pictures -----------------------------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]     # Okabe and Ito's, for every eye


def picture(draw):
    """Turn draw(pyplot, ..., path) -> figure into a function of (..., path) that saves the figure and returns the path; without
    matplotlib it returns None, with a line on how to get it."""
    @functools.wraps(draw)
    def save(*arguments):
        try:
            import matplotlib
            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            return print('no pictures: matplotlib is missing (pip install -e ".[plots]")')
        with pyplot.rc_context({"axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True, "savefig.dpi": 120,
                                "axes.prop_cycle": pyplot.cycler(color=COLOURS)}):
            figure = draw(pyplot, *arguments[:-1])
            figure.savefig(arguments[-1])
        pyplot.close(figure)
        return arguments[-1]
    return save


def named(*paths):
    """What a line on saved results says of its pictures, which are None where matplotlib is missing."""
    return "".join(f", picture {path}" for path in paths if path)


@picture
def draw_pass_at_k(plt, figures):
    """pass@k over k for every arm; greedy, with its one sample, as a level line. Arms without a latent are dashed."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for i, (arm, row) in enumerate(figures.items()):
        points = {int(name[5:]): value[0] for name, value in row.items() if name.startswith("pass@")}
        control = arm.split(" + ")[0] in ("greedy", "sampling", "noise", "gauss", "shuffled")
        axis.plot(*zip(*points.items()), "--" if control else "-", marker=None if arm == "greedy" else "osD^v"[i % 5],
                  color=COLOURS[i % len(COLOURS)], markersize=4, label=arm)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axis.set(xlabel="k (samples a question)", ylabel="pass@k", ylim=(0, 1.02))
    figure.legend(loc="outside right center", fontsize=9)
    return figure


@picture
def draw_sweep(plt, points):
    """One panel an axis: pass@8 (or the largest k there is, if smaller) of each arm along it."""
    figure, axes = plt.subplots(1, len(points), figsize=(3.6 * len(points) + 1.5, 3.4), sharey=True, squeeze=False)
    for axis, (name, values) in zip(axes[0], points.items()):
        arms = next(iter(values.values()))
        k = max((k for k in next(iter(arms.values())) if k.startswith("pass@") and int(k[5:]) <= 8), key=lambda k: int(k[5:]))
        for i, arm in enumerate(arms):
            mean, error = zip(*(row[arm][k] for row in values.values()))
            axis.errorbar(range(len(values)), mean, error, marker="osD^v"[i % 5], markersize=4, capsize=2, label=arm)
        axis.set(xlabel={"length": "prefix rows L", "beta": "beta of the VAE"}.get(name, name), ylim=(0, 1.02),
                 xticks=range(len(values)), xticklabels=[f"{value:g}" for value in values])
    axes[0][0].set_ylabel(f"{k} ± standard error")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return figure


@picture
def draw_reward_map(plt, vae, maps):
    """The reward map: every z of the arm `latent` by the first two principal directions of the prefixes it decodes to, coloured
    by how often its neighbours in latent space were right; one panel a family. Crosses: the centres of the domains' Gaussians."""
    figure, axes = plt.subplots(1, len(maps), figsize=(4.6 * len(maps) + 1, 4), sharex=True, sharey=True, squeeze=False)
    parts = [vae.decode(z) for z, _ in maps.values()] + [vae.decode(vae.domain_mean)]
    *parts, centres = pca(torch.cat(parts)).split([len(part) for part in parts])                  # [N, 2] each, [domains, 2]
    for axis, (name, (z, smooth)), places in zip(axes[0], maps.items(), parts):
        dots = axis.scatter(*places.T, c=smooth, s=9, cmap="viridis", vmin=0, vmax=1)
        for domain, place in zip(vae.domains, centres.tolist()):
            axis.plot(*place, "x", color="#D55E00", markersize=9, markeredgewidth=2.5)
            axis.annotate(domain, place, (6, 6), textcoords="offset points", color="#D55E00", weight="bold",
                          bbox=dict(boxstyle="round,pad=0.1", color="white", alpha=0.8))
        axis.set(title=f"{name}: {len(z)} latents", xlabel="1st principal direction", ylabel="2nd", xticks=[], yticks=[])
    figure.colorbar(dots, ax=axes, label="share right among the 32 nearest latents")
    return figure


def running_mean(points, width=5):
    """(step, value) pairs with each value replaced by the mean of the last `width`."""
    return {points[i][0]: sum(y for _, y in points[max(0, i - width + 1):i + 1]) / min(i + 1, width) for i in range(len(points))}


def draw_boxes(task, results, path, count=8, side=168):
    """boxes.png (as Fig. 5): the first scenes, one row of pictures for each arm of Table 2, with the gold box (green) and the
    boxes of its samples (red). By Pillow alone. A sample without a box draws nothing: an arm of another format shows gold."""
    from PIL import Image, ImageDraw
    table_2 = ("greedy", "sampling", "latent", "latent + sampling")
    rows, results = task.test[:count], {arm: results[arm] for arm in table_2 if arm in results} or results
    sheet = Image.new("RGB", (110 + side * len(rows), side * len(results)), "white")
    for i, (name, samples) in enumerate(results.items()):
        ImageDraw.Draw(sheet).text((6, side * i + side // 2), name.replace(" + ", " +\n"), fill="black")
        for j, row in enumerate(rows):
            image = open_image(row["image"])
            scale = [(side - 4) / x for x in ((1000, 1000) if task.name.endswith(":1000") else image.size)]
            image, boxes = image.resize((side - 4, side - 4)), [s["completion"] for s in samples if s["row"] == j]
            for colour, box in [*(("red", parse_box(text)) for text in boxes), ("lime", parse_box(row["answer"]))]:
                if box:
                    ImageDraw.Draw(image).rectangle([x * s for x, s in zip(box, scale * 2)], outline=colour, width=2)
            sheet.paste(image, (110 + side * j, side * i))
    sheet.quantize().save(path)                             # 256 colours: a third of the size
    return path


@picture
def draw_curves(plt, folders):
    """Learning curves of RL runs (Fig. 6): reward of guided and unguided rollouts (running mean of 5 steps), and greedy accuracy
    without prefix. Runs whose folders differ in the seed alone are one line, their mean, in a band from the least to the most."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True)
    titles = {"reward_guided": "reward of guided rollouts", "reward_unguided": "reward of unguided rollouts",
              "eval_accuracy": "greedy accuracy without prefix"}
    paths, labels = [Path(folder).resolve() for folder in folders], {}
    for path in paths:                                      # runs of several --out are told apart by it
        name = path.name if len({path.parent for path in paths}) == 1 else f"{path.parent.name}/{path.name}"
        labels.setdefault((path.parent, name.rsplit("-s", 1)[0]), []).append(metrics_of(path))
    for i, ((_, label), runs) in enumerate(labels.items()):
        for axis, name in zip(axes, titles):
            curves = [running_mean([(row["step"], row[name]) for row in rows if row.get(name) is not None],
                                   1 if name == "eval_accuracy" else 5) for rows in runs]         # 64 rollouts a step are noisy
            steps = sorted(set().union(*curves))
            values = [[curve[step] for curve in curves if step in curve] for step in steps]
            style = dict(color=COLOURS[i % len(COLOURS)], linestyle=("-", "--", ":", "-.")[i % 4])
            axis.plot(steps, [sum(v) / len(v) for v in values], **style, label=f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})")
            axis.fill_between(steps, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.15, linewidth=0)
    for axis, title in zip(axes, titles.values()):
        axis.set(title=title, xlabel="step")
    low, high = axes[0].get_ylim()                          # shared; penalties reach below 0, weighted sums above 1
    axes[0].set_ylim(min(low, -0.02), max(high, 1.02))
    axes[0].set_ylabel("mean over rollouts or questions")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


# ---- the paper's figures and tables in miniature ------------------------------------------------------------------------

# The paper's figures, by the name of our row: Table 1 (pass@8), Table 2 (pass@32), Table 3 (average pass@1).
PAPER_DOMAINS = {"code": ".708 / .430 / .945", "math": ".724 / .461 / .950", "qa": ".710 / .455 / .936"}
PAPER_ARMS = {"greedy": ".020 / .020 / .047", "sampling": ".651 / .626 / .720", "latent": ".721 / .731 / .731",
              "latent + sampling": ".875 / .860 / .857"}
PAPER_RL = {"grpo none": ".212 / .583 / .601", "grpo two-phase": ".229 / .608 / .606", "grpo linear": ".241 / .601 / .612",
            "rloo none": ".218 / .594 / .599", "rloo two-phase": ".228 / .607 / .623", "rloo linear": ".235 / .613 / .630"}

Section = namedtuple("Section", "title command picture text")             # of the page; command: its key in reproduce_commands
CURVES = "Line: mean over seeds; band: lowest to highest. Paper: latent variants learn slower at first, then pass the baseline."
SECTIONS = (
    Section("Is the gain really from the latent?", "all", None,
            "What speaks for the paper's account in this miniature, and what against. Arms: differences on the same questions, "
            "paired bootstrap 95% interval, no difference shown where it holds 0. RL: mean ± standard deviation over seeds, no "
            "difference shown where the means are closer than the root of the summed squares of the two."),
    Section("Figure 1: one noise token before the prompt", "noise-token", "noise-token/pass_at_k.png",
            "A Gaussian vector with the norm of a token embedding before the prompt of the base model, greedy. Paper "
            "(Qwen3-4B-Base, GSM8K): pass@32 rises from .529 to .853."),
    Section("Figure 3: latents and decoded prefixes", "grpo", "vae/latents.png",
            "100 traces a domain, as in the paper; there as here they cluster by domain. (The domains of the tiny world differ "
            "in their words, so this is no surprise.)"),
    Section("Table 1: the domain of the latents against the task", "arms", None,
            "pass@8, greedy, latents of one domain; controls: shuffled latents, and the prior (latent). The paper's model and "
            "tasks are others: compare the pattern, not the numbers."),
    Section("Table 2: sampling, latents, and both", "arms", "arms/pass_at_k.png",
            "The paper's arms (Qwen2.5-VL-3B, pass@32) and controls: noise, gauss (a Gaussian on h, no VAE), shuffled. follows "
            "domain: share of answers in the style of their latent's domain."),
    Section("Table 3: RL with injected latents", "grpo", None,
            "Greedy pass@1 without prefix; the paper's is the average over five benchmarks. ...-noise: the control, noise "
            "prefixes instead of latents."),
    Section("Figure 6: learning curves of GRPO", "grpo", "grpo.png", CURVES),
    Section("Figure 6: learning curves of RLOO", "rloo", "rloo.png", CURVES),
    Section("Which latents are right", "arms", "arms/reward_map.png",
            "Not in the paper. On half of the questions a Gaussian is fitted to the z of right answers, and the z with the most "
            "successful neighbours is picked; the table shows both on the other half."))


def reproduce_commands(args):
    """{name: command line of --reproduce}; the first one builds the base model, the VAE and the warm-ups that the others use."""
    small = ["--base-steps", "60", "--steps", "4", "--eval-questions", "16"] if args.quick else []
    grpo = ["grpo.py", "--base-seed", args.base_seed, "--seed", *args.seeds, "--arms", "none", "--resume", *small, "--out",
            args.out]
    noise = ["--schedule", "two-phase", "linear", "--source", "noise"]
    asked = ["--questions", "8", "--samples", "8"] if args.quick else ["--questions", "128"]
    measure = ["evaluate.py", "--vae", f"{args.out}/vae", "--resume", *asked]
    commands = {"grpo": grpo, "rloo": [*grpo, "--algorithm", "rloo"], "grpo-noise": [*grpo, *noise],
                "rloo-noise": [*grpo, "--algorithm", "rloo", *noise],
                "arms": [*measure, "--model", f"{args.out}/sft", "--analyse", "--out", f"{args.out}/arms"],
                "noise-token": [*measure, "--model", f"{args.out}/base", "--arms", "greedy", "sampling", "noise", "--length", "1",
                                "--out", f"{args.out}/noise-token"]}
    return {name: [str(word) for word in command] for name, command in commands.items()}


def run_command(name, command, out):
    """Run one command on one thread, its output in OUT/logs/NAME.txt; not again where it has finished. Returns its minutes."""
    record, log, began = out / "logs" / f"{name}.json", out / "logs" / f"{name}.txt", time.time()
    known = json.loads(record.read_text()) if record.is_file() else {}
    if known.get("command") != command:
        print("python " + shlex.join(command), flush=True)
        script = str(Path(__file__).with_name(command[0]))
        with open(log, "a") as file:
            done = subprocess.run([sys.executable, script, *command[1:]], stdout=file, stderr=file,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            last = (log.read_text().replace("\r", "\n").strip() or "no output").split("\n")[-1]
            raise ValueError(f"{shlex.join(command)} failed ({last}); see {log}; the same --reproduce goes on where it stopped")
        known = {"command": command, "minutes": (time.time() - began) / 60}
        write_text(record, json.dumps(known))
    return known["minutes"]


def reproduce(args):
    """--reproduce: every figure and table of the paper that the tiny world can show, with controls, on one HTML page."""
    out, commands = Path(args.out), reproduce_commands(args)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    first, *others = commands
    minutes = [run_command(first, commands[first], out)]
    with ThreadPoolExecutor(2) as pool:
        minutes += pool.map(lambda name: run_command(name, commands[name], out), others)
    commands["all"] = ["evaluate.py", "--reproduce", "--base-seed", str(args.base_seed), "--seeds", *map(str, args.seeds)]
    seeds = " ".join(map(str, args.seeds))
    note = (f"tiny world, base seed {args.base_seed}, RL seeds {seeds}; {date.today()}; {os.cpu_count()} CPU cores, "
            f"one thread a process, {sum(minutes):.0f} process minutes in all; torch {torch.__version__}")
    sections = [{**section._asdict(), "command": "python " + shlex.join(commands[section.command]), "rows": rows}
                for section, rows in zip(SECTIONS, reproduced_tables(out, args.seeds))]
    write_text(out / "results.json", json.dumps({"note": note, "sections": sections}, indent=1))
    write_text(out / "index.html", page(sections, note, out))
    print(f"\n{markdown(sections[0]['rows'])}\n\n{note}\nthe page: {out / 'index.html'}")


def reproduced_tables(out, seeds):
    """The table of every section, or None, from the folders that the commands filled; also draws Fig. 6."""
    load = lambda name: json.loads((out / name).read_text())
    beside = lambda rows, title, paper: [[row[0], paper.get(row[0], "") if i else title, *row[1:]] for i, row in enumerate(rows)]
    token, figures = load("noise-token/results.json")["arms"], load("arms/results.json")["benchmarks"]
    k = [name for name in token["noise"] if name.startswith("pass@")][-1]
    families = [name for name in figures if "/" in name]
    domains = [["latents of", *(f"ours, pass@8 on {name}" for name in families)]]
    for arm in (*PAPER_DOMAINS, "shuffled", "latent"):
        domains.append([arm, *(f"{figures[name][arm]['pass@8'][0]:.3f}" for name in families)])
    runs = {}
    for algorithm in ("grpo", "rloo"):
        kinds = ("none", "two-phase", "linear", "two-phase-noise", "linear-noise")
        folders = {f"{algorithm} {kind}": [out / f"{algorithm}-{kind}-s{seed}" for seed in seeds] for kind in kinds}
        runs.update({name: rl_figures(paths) for name, paths in folders.items()})
        draw_curves([path for paths in folders.values() for path in paths], out / f"{algorithm}.png")
    return [verdicts(out, runs), arms_table(token, "sampling", k), None,
            beside(domains, "paper: MATH500 / Olympiad / GSM8K", PAPER_DOMAINS),
            beside(arms_table(figures["tiny"], "sampling", k), "paper: RefCOCO / + / g", PAPER_ARMS),
            beside(rl_rows(runs), "paper: 1.7B / 4B / 8B", PAPER_RL), None, None, load("arms/analysis.json")["table"]]


def steers(follows):
    """Whether latents of a domain set the style, in nearly all answers, and shuffled ones do not. follows: {arm: share}."""
    return follows["shuffled"] < 0.6 and all(share >= 0.9 for arm, share in follows.items() if arm != "shuffled")


def verdict(low, high):
    """What a difference whose interval goes from low to high says of the paper's account."""
    return "for" if low > 0 else "against" if high < 0 else "no difference shown"


def verdicts(out, runs):
    """The questions that the controls answer: rows of question, figures, and whether these speak for the paper's account."""
    scores = {}
    for folder in ("noise-token", "arms"):
        samples = read_samples(out / folder)["tiny"]
        n = max(sample["sample"] for sample in samples["sampling"]) + 1
        scores[folder] = {arm: [score(own, powers(n))] for arm, own in samples.items()}
    follows = {arm: mean_and_error(part["follows"])[0] for arm, (part,) in scores["arms"].items() if "follows" in part}
    rows = [["question", "figures", "verdict"],
            ["Does the domain of a latent set the style of the answer?", "follows domain: " + ", ".join(
                f"{arm} {share:.2f}" for arm, share in follows.items()), "for" if steers(follows) else "against"]]
    for question, folder, arm, other, k in (
            ("Does one noise token beat greedy decoding?", "noise-token", "noise", "greedy", n),
            ("Does it beat token sampling?", "noise-token", "noise", "sampling", n),
            ("Do latents with sampling beat sampling?", "arms", "latent + sampling", "sampling", n),
            ("Do they beat noise prefixes with sampling?", "arms", "latent + sampling", "noise + sampling", 8),
            ("Is the VAE better than a plain Gaussian on h?", "arms", "latent", "gauss", 8),
            ("Are latents better than shuffled ones?", "arms", "latent", "shuffled", 8)):
        figures = figures_of({name: scores[folder][name] for name in (arm, other)}, other)
        difference = figures[arm]["difference"][f"pass@{k}"]                                       # mean, low, high
        rows.append([question, f"{arm} against {other}, pass@{k}: {signed(difference)}",
                     verdict(*difference[1:])])
    for algorithm, kind in itertools.product(("grpo", "rloo"), ("two-phase", "linear")):
        for other in ("none", f"{kind}-noise"):
            a, b = runs[f"{algorithm} {kind}"], runs[f"{algorithm} {other}"]
            gap, spread = a["mean"] - b["mean"], max(math.hypot(a["std"], b["std"]), 0.01)
            rows.append([f"RL with {algorithm}: is {kind} better than {other}?",
                         f"{a['mean']:.3f} ± {a['std']:.3f} against {b['mean']:.3f} ± {b['std']:.3f}; "
                         f"mean over the run {a['course']:.3f} against {b['course']:.3f}",
                         verdict(gap - spread, gap + spread) if len(a["end"]) > 1 else "one seed shows nothing"])
    return rows


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Reasoning Palette in miniature</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; font-size: 12px; margin: 1em 0 }} .wide {{ overflow-x: auto }}
th, td {{ border: 1px solid #bbb; padding: 3px 5px; text-align: left }} td {{ white-space: nowrap }} th {{ background: #eee }}
img {{ max-width: 100% }} code, .note {{ font-size: 13px; color: #555; overflow-wrap: anywhere }}
</style></head><body>
<h1>Reasoning Palette in miniature</h1>
<p>The figures and tables of arXiv 2512.17206 that a made-up world and a model of 0.4 million weights can show, with controls.
Numbers of the paper stand beside ours for the pattern; model, tasks and scale are others.</p>
{body}
</body></html>
"""


def page(sections, note, folder):
    """The sections as one HTML page without any outside file: pictures stand in it as base64 PNG."""
    parts = []
    for section in sections:
        title, rows, picture = html.escape(section["title"]), section["rows"], folder / (section["picture"] or "none")
        parts.append(f"<h2>{title}</h2>\n<p>{html.escape(section['text'])}</p>")
        if rows:
            cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            lines = [f"<tr>{cells(row, 'td' if i else 'th')}</tr>" for i, row in enumerate(rows)]
            parts.append('<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>")
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
        parts.append(f'<p class="note"><code>{html.escape(section["command"])}</code><br>{html.escape(note)}</p>')
    return PAGE.format(body="\n".join(parts))


# ---- command line -------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The flags; exits with status 2 and one sentence where they cannot be right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, "model and data",
              model=("tiny", "hub name, folder, run folder, tiny or tiny-vl"),
              vae=(str, "VAE folder, or none (default: runs/tiny/vae; runs/tiny-vl/vae for tiny-vl)"),
              task=([str], f"{TASKS}, or names for --test-data (default: tiny; tiny-vl for that model)"),
              test_data=([str], "JSONL of {question, answer} or hub:DATASET:CONFIG:SPLIT; TASK= with several tasks (default: each "
                         "task's own)", "[TASK=]SOURCE"),
              prompt=("auto", "prompt format", PROMPT_STYLES),
              questions=(64, "test questions a task", 1),
              out=(str, "where the results go (default: runs/MODEL/evaluation; runs/reproduce for --reproduce)"))
    add_flags(parser, "arms",
              arms=([str], "greedy, sampling, noise, gauss, shuffled, latent, 'noise + sampling', 'gauss + sampling', 'latent + "
                    "sampling', a domain, or all (default: all)", "ARM"),
              against=("sampling", "reference of the differences", "ARM"),
              samples=(32, "samples a question in every arm but greedy", 1),
              length=(8, "prefix rows L", 0),
              independent=(False, "L independent latents instead of one tiled"),
              temperature=(1.0, "of the sampling arms", 0),
              top_p=(1.0, "of the sampling arms; 1: off", 0),
              top_k=(0, "of the sampling arms; 0: off", 0),
              max_new_tokens=(int, "longest answer (default: 34 for tiny, 14 for tiny-vl, else 512)", 1))
    add_flags(parser, "what to do instead, or in addition",
              rescore=(False, "judge the samples in --out again, without any model"),
              analyse=(False, "also: which region of latent space answers which questions"),
              sweep=([str], "one axis at a time: length, beta, temperature, top_p (default: none)", "AXIS=V,V"),
              curves=([str], "only draw the learning curves of these RL runs (default: none)", "RUN"),
              reproduce=(False, "the paper's figures and tables on the tiny world, as one page"),
              base_seed=(0, "--reproduce: seed of the base model"),
              seeds=([0, 1, 2], "--reproduce: RL seeds"),
              quick=(False, "--reproduce: hardly trained; checks the way, not the results"))
    add_flags(parser, "machine and seed",
              device=("auto", "auto, cpu, cuda or mps"),
              dtype=("float32", "of the weights", ("float32", "bfloat16")),
              slots=(64, "rows decoded at a time", 1),
              seed=(0, "seed of prefixes and tokens"),
              resume=(False, "go on with an interrupted evaluation of the same settings"))
    return checked(parser, parser.parse_args(argv))


def checked(parser, args):
    """Fill in what depends on other flags, and refuse what cannot work, before any work."""
    world = "tiny-vl" if "tiny-vl" in (args.model, *(args.task or ())) else "tiny"
    args.task, args.vae = args.task or [world], args.vae or f"runs/{world}/vae"
    args.max_new_tokens = args.max_new_tokens or {"tiny": 34, "tiny-vl": 14}.get(" ".join(args.task), 512)
    args.out = args.out or ("runs/reproduce" if args.reproduce else f"runs/{world}/evaluation")
    args.arms = args.arms or (["sampling", "latent", "latent + sampling"] if args.sweep else ["all"])
    if args.analyse and args.arms != ["all"]:
        args.arms = list(dict.fromkeys([*args.arms, "latent"]))
    if args.analyse and (args.independent or args.vae == "none" or args.length == 0):
        parser.error("--analyse needs a VAE and one latent a sample: drop --independent, --vae none or --length 0")
    if args.analyse and args.sweep:
        parser.error("--analyse and --sweep are two jobs: drop one")
    if len(set(args.task)) < len(args.task) or len(args.task) > 1 and "average" in args.task:
        parser.error(f"--task names {' '.join(args.task)}: each benchmark once, and none of them average")
    given = [item.partition("=")[::2] if item.partition("=")[0] in args.task else (None, item) for item in args.test_data or ()]
    if len(dict(given)) < len(given) or None in dict(given) and len(args.task) > 1:
        parser.error("--test-data with several tasks takes TASK=SOURCE for each, e.g. gsm8k=gsm8k_test.jsonl")
    args.test_data = {name or args.task[0]: source for name, source in given}
    axes = {"length": int, "beta": float, "temperature": float, "top_p": float}
    try:
        args.sweep = {axis: [axes[axis](value) for value in values.split(",")]
                      for axis, _, values in (item.partition("=") for item in args.sweep or ())}
    except (KeyError, ValueError):
        parser.error(f"--sweep takes AXIS=VALUE,VALUE with AXIS one of {', '.join(axes)}, not {' '.join(args.sweep)}")
    if "beta" in args.sweep and args.vae == "none":
        parser.error("--sweep beta needs a VAE to vary: drop --vae none")
    for axis, low, high in (("length", 0, 10**6), ("beta", 0, 10**6), ("temperature", 0, 10**6), ("top_p", 1e-6, 1)):
        for value in (getattr(args, axis, low), *args.sweep.get(axis, ())):
            if not low <= value <= high:
                parser.error(f"{axis.replace('_', '-')} must be from {low} to {high}, not {value}")
    return args


def main(argv=None):
    """Run the arms, save samples, figures, tables and pictures. Returns the figures of every benchmark by arm."""
    args = parse_args(argv)
    if args.curves:
        return print(f"drawn{named(draw_curves(args.curves, Path(args.curves[0]).parent / 'curves.png'))}")
    if args.reproduce or args.rescore:
        return reproduce(args) if args.reproduce else rescore(args)
    tasks = [load_task(name, test=args.test_data.get(name), splits=("test",)) for name in args.task]
    args.model, began = find_model(args.model), time.time()
    vae = None if args.vae == "none" else find_vae(args.vae, args.model)
    device = torch.device(device_of(args.device))
    model, tokenizer = load_policy(args.model, device, getattr(torch, args.dtype))
    lab = Lab(Decoder(model, end_ids(model, tokenizer), args.slots), tokenizer, model.get_input_embeddings().weight.detach(), vae)
    asked = ", ".join(f"{len(task.test[:args.questions])} questions of {task.name}" for task in tasks)
    tiling = "independent" if args.independent else "tiled"
    note = lambda: (f"{args.model}: {asked} x {args.samples} samples, L = {args.length} {tiling}, seed {args.seed}; "
                    f"{date.today()}, {time.time() - began:.0f} s on {hardware(device)}")
    if args.sweep:
        return sweep(lab, tasks, args, note)
    for task in tasks if args.analyse else ():
        halves(task, args.questions)                        # an error in them comes before the arms
    results = run_arms(lab, tasks, args)
    figures = save_results(args, results, note())
    for task in tasks:
        if isinstance(task, GroundingTask):
            print("picture", draw_boxes(task, results[task.name], Path(args.out) / "boxes.png"))
    if args.analyse:
        analyse(lab, tasks, args, results)
    return figures


def close_rl(args, folders, policies, device):
    """The tables and pictures that close grpo.py's main job. args: grpo.py's; folders: {schedule: run folders};
    policies: {schedule: the policy it started from}."""
    root = Path(args.out)
    if args.arms != ["none"]:
        policy = next((policy for schedule, policy in policies.items() if schedule != "none"), policies.get("none"))
        print(f"\nWhat prefixes do before RL (policy {policy}):", flush=True)
        out = root / "evaluation"
        argv = as_flags(
            model=policy, vae=args.vae, task=args.task, test_data=args.test_data, prompt=args.prompt, device=args.device, out=out,
            questions=args.arm_questions, samples=args.arm_samples, arms=args.arms, length=args.length, slots=args.slots,
            independent=args.independent, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
            max_new_tokens=args.max_new_tokens)
        same = (out / "config.json").is_file() and read_json(out / "config.json") == settings_of(parse_args(argv))
        main([*argv, *as_flags(resume=args.resume and same)])
    name = f"{args.algorithm}-{args.source}"
    picture = draw_curves([path for paths in folders.values() for path in paths], root / f"{name}.png")
    print(f"\nWhat injection does in RL ({args.steps} steps of {args.prompts} x {args.group} rollouts):\n")
    print(rl_table(root, name, folders))
    pictures = [str(path) for path in (picture, *sorted(root.glob("*/*.png"))) if path]
    print(f"\n{hardware(device)}\nmetrics and samples: {root}/{args.algorithm}-*\npictures: {' '.join(pictures) or 'none'}")


if __name__ == "__main__":
    run_main(main, "evaluate.py")
