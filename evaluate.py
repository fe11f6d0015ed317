"""Measuring what latents do: pass@k of several arms at an equal budget of samples, with controls.

An arm is a way to get n different answers to a question: sampling tokens, or greedy decoding under
n different prefixes, or both. Is a gain really from the latent? The controls tell:
  noise     a random prefix with the norm of real tokens: would any disturbance do?
  gauss     a prefix from a Gaussian fitted to mean-pooled embeddings: is the VAE needed?
  shuffled  latents of the domains with the entries of each z in random order: does the place in
            latent space matter? They keep the length and entries of z and lose the domain, so
            `follows` must fall to chance. (Our choice. z is drawn independently of the question,
            so dealing the latents out to other questions would change nothing.)
pass@k is the unbiased estimator of Chen et al. 2021; differences to a reference arm carry a paired
bootstrap interval. Every source of prefixes in prefix.SOURCES that names an arm is one here.

`--control` measures without a task or a judge: the loss of held-out answers of each domain under
prefixes of each source. What does a prefix cost, and is an answer likelier under latents of its own
domain? Held out is every tenth trace, which neither the VAE nor the warm-up learns from, if all
of them are given the same --traces and --limit.

Departs from the paper: it evaluates each arm on its own benchmark and model and gives no
intervals; here all arms see the same questions, the same policy and the same number of samples.

Run it (writes results.json, results.md, samples.jsonl, pass_at_k.png into --out):
    python evaluate.py                          # the tiny base model, made where it is missing
    python evaluate.py --model tiny-vl          # its sister for pictures: Table 2 and boxes.png
    python evaluate.py --model runs/tiny/sft    # after the warm-up
    python evaluate.py --model runs/tiny/sft --control --answers 64     # control.md: no task
    python evaluate.py --model runs/qwen/sft --vae runs/qwen/vae --task gsm8k math --samples 8
    python evaluate.py --model runs/qwen/sft --vae runs/qwen/vae --task mine=my_questions.jsonl
"""

import json
import math
import os
import platform
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import vae as vae_stage
from prefix import (
    SOURCES,
    Decoder,
    Palette,
    Sampling,
    check_prompts,
    complete,
    end_ids,
    load_policy,
    prompt_of,
)
from rewards import (
    DEFAULT_WORLD,
    PROMPT_STYLES,
    answers_equal,
    load_task,
    parse_box,
    world_defaults,
    world_of,
    world_root,
)
from sft import Control, device_of, measure_control, seed_of
from vae import VAE, load_traces, open_image, read_json, require_at_least, write_text

# ---- estimators ----------------------------------------------------------------------------------


def pass_at_k(n, correct, k):
    """Probability that one of k samples is right, drawn without replacement from n samples.

    1 - C(n - c, k) / C(n, k), c of the n being right (Chen et al. 2021, Eq. 1); unbiased for the
    pass@k of fresh samples. ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a question, there are {n}")
    all_wrong = math.comb(n - correct, k) / math.comb(n, k)
    return 1.0 - all_wrong


def vote(answers):
    """Group equal answers, by the verifier's equality; None is no answer.

    Returns {answer: votes}, most votes first; the answer is the first one of its group.
    """
    spellings = Counter(answer for answer in answers if answer is not None)
    votes = {}
    for spelling, count in spellings.items():
        winner = spelling
        for answer in votes:
            if answers_equal(spelling, answer) is True:
                winner = answer
                break
        votes[winner] = votes.get(winner, 0) + count
    ranking = sorted(votes.items(), key=lambda group: -group[1])
    return dict(ranking)


def majority(votes, gold):
    """maj@n of what `vote` gives: 1.0 if the answer with most votes is right.

    A tie counts as the share of its answers that are right: what a fair draw between them would
    give on average, without the draw.
    """
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == most]
    right = [answer for answer in leaders if answers_equal(answer, gold) is True]
    return len(right) / len(leaders)


def mean_and_error(*benchmarks):
    """(mean, standard error): the mean over benchmarks of the mean over questions.

    benchmarks: lists, one value a question. Each benchmark weighs the same, however many questions
    it has, as in the paper's Table 3.
    """
    means = 0.0
    variance = 0.0
    for benchmark in benchmarks:
        values = torch.tensor(benchmark, dtype=torch.float64)  # [Q]
        means += values.mean().item()
        if len(values) > 1:
            variance += (values.var() / len(values)).item()
    return means / len(benchmarks), math.sqrt(variance) / len(benchmarks)


def bootstrap(*benchmarks, resamples=2000, seed=0):
    """(mean, low, high): the mean of `mean_and_error` with its 95% percentile interval.

    Questions are drawn with replacement, within their benchmark. Of differences between two arms,
    question by question, this is the paired bootstrap: what makes a question hard for both arms
    cancels.
    """
    generator = torch.Generator().manual_seed(seed)
    means = 0.0
    for benchmark in benchmarks:
        values = torch.tensor(benchmark, dtype=torch.float64)  # [Q]
        size = (resamples, len(values))
        picks = torch.randint(len(values), size, generator=generator)  # [resamples, Q]
        means = means + values[picks].mean(1) / len(benchmarks)  # [resamples]

    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = means.quantile(ends).tolist()
    mean, _ = mean_and_error(*benchmarks)
    return mean, low, high


# ---- answering questions -------------------------------------------------------------------------


@dataclass
class Policy:
    """What every arm needs of the model under test."""

    decoder: Decoder
    reader: vae_stage.Reader
    table: torch.Tensor  # its embedding table E [V, d]
    vae: VAE | None = None  # trained on this table; None leaves the arms that need none


def question_key(row):
    """What names a question: its id, if it has one (pictures may share their question)."""
    return row.get("id", row["question"])


def prefix_seed(seed, question, number):
    """The seed of a sample's prefix. question: its question_key; number: of the sample.

    Palette.draw(seed) rebuilds the prefix and its z, so samples.jsonl need not hold them.
    """
    return seed_of(seed, "prefix", question, number)


def answer_questions(
    decoder, reader, task, rows, palette, sampling, n, seed, prompt_style="auto", progress=None
):
    """n judged answers to each of `rows`; with a palette each under a prefix of its own.

    Seeds depend on the question (its text, or its id) and the sample's number alone, so neither the
    order of the questions nor a split over ranks changes an answer.

    Returns one dict a sample: row (its question's number), question (question_key), gold, family
    where the row names one, domain where the latent comes from one, sample, completion, the
    judge's numbers, answer, style where the task tells styles, finish, tokens.
    """
    answers = []
    prompts = []
    prefixes = []
    seeds = []
    for number, row in enumerate(rows):
        question = question_key(row)
        prompt = prompt_of(row, reader, task.instruction, prompt_style)
        for sample in range(n):
            answer = {"row": number, "question": question, "gold": row.get("answer")}
            if "family" in row:
                answer["family"] = row["family"]
            embeddings = None
            if palette is not None:
                prefix = palette.draw(prefix_seed(seed, question, sample))
                embeddings = prefix.embeddings  # [L, d], or None for L = 0
                if prefix.domain is not None:
                    answer["domain"] = prefix.domain
            answer["sample"] = sample
            answers.append(answer)
            prompts.append(prompt)
            prefixes.append(embeddings)
            seeds.append(seed_of(seed, "token", question, sample))

    completions, texts = complete(
        decoder, reader, prompts, prefixes, sampling, seeds, prompt_style, progress
    )

    for answer, completion, text in zip(answers, completions, texts):
        row = rows[answer["row"]]
        answer["completion"] = text
        answer.update(task.judge(text, row, completion.finish))
        answer["answer"] = task.extract(text, row, completion.finish)
        style = task.style(text)
        if style is not None:
            answer["style"] = style
        answer["finish"] = completion.finish
        answer["tokens"] = len(completion.ids)
    return answers


def greedy_accuracy(decoder, reader, task, config, ranks):
    """Greedy pass@1 without prefix on the first --eval-questions test rows, over all ranks."""
    rows = ranks.shard(task.test[: config.eval_questions])
    sampling = Sampling(0.0, max_new_tokens=config.max_new_tokens)
    answers = answer_questions(decoder, reader, task, rows, None, sampling, 1, 0, config.prompt)
    right = sum(answer["accuracy"] for answer in answers)
    right, count = ranks.all_reduce_sum([right, len(answers)])
    return right / max(count, 1)


# ---- arms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A way to get different answers to a question."""

    source: str  # of prefixes: one of prefix.SOURCES or a domain
    temperature: float  # 0: greedy decoding

    def palette(self, policy, config):
        """Where its prefixes come from; None for an arm without."""
        if self.source == "none":
            return None
        tiled = not config.independent
        return Palette(policy.vae, policy.table, self.source, config.length, tiled)

    def sampling(self, config):
        """How its tokens are picked."""
        return Sampling(
            self.temperature, config.top_p, config.top_k, max_new_tokens=config.max_new_tokens
        )

    def samples(self, config):
        """How many samples a question; greedy without prefix, a second would be like the first."""
        if self.source == "none" and self.temperature == 0:
            return 1
        return config.samples


def arms_of(domains, temperature, with_vae=True):
    """{name: Arm}: all arms that there are.

    Greedy decoding and sampling without prefix; each source of prefixes that names an arm, greedy
    and with sampling; the domains of the VAE. Without a VAE those that need one are left out.
    """
    sources = {}
    for name, source in SOURCES.items():
        if source.arm is not None and (with_vae or not source.needs_vae):
            sources[name] = source

    arms = {"greedy": Arm("none", 0.0), "sampling": Arm("none", temperature)}
    for name, source in sources.items():
        arms[source.arm] = Arm(name, 0.0)
    for name, source in sources.items():
        if source.with_sampling:
            arms[f"{source.arm} + sampling"] = Arm(name, temperature)
    for domain in domains:
        arms[domain] = Arm(domain, 0.0)
    return arms


def choose_arms(config, vae):
    """The arms of --arms. ValueError for one that there is not, or for a missing --against."""
    domains = () if vae is None else vae.domains
    arms = arms_of(domains, config.temperature, with_vae=vae is not None)
    if config.arms != ["all"]:
        for name in config.arms:
            if name not in arms:
                raise ValueError(f"unknown arm '{name}': choose from {', '.join(arms)}, or all")
        arms = {name: arms[name] for name in config.arms}
    if config.against not in arms and config.against != "sampling":
        raise ValueError(f"--against {config.against} is not among the arms: {', '.join(arms)}")
    return arms


def run_arms(policy, tasks, config):
    """Answer the first --questions test rows of every task in every arm; samples.jsonl keeps them.

    Returns {benchmark: {arm: samples}}, see answer_questions. Finished arms are not run again where
    the evaluation is resumed.
    """
    # all is set up and checked before the first arm runs
    arms = choose_arms(config, policy.vae)
    palettes = {name: arm.palette(policy, config) for name, arm in arms.items()}
    room = config.length + config.max_new_tokens
    positions = policy.decoder.model.config.get_text_config().max_position_embeddings
    for task in tasks:
        rows = task.test[: config.questions]
        check_prompts(
            rows, policy.reader, task.instruction, config.prompt, room=room, positions=positions
        )

    finished = open_samples(config, tasks)
    total = 0
    for task in tasks:
        questions = len(task.test[: config.questions])
        total += questions * sum(arm.samples(config) for arm in arms.values())

    results = {}
    with tqdm(total=total, desc="evaluate", unit="answer") as bar:
        for task in tasks:
            results[task.name] = {}
            for name, arm in arms.items():
                bar.set_postfix_str(f"{task.name}, {name}")
                answers = finished.get(task.name, {}).get(name)
                if answers is None:
                    answers = answer_arm(policy, task, arm, palettes[name], config, bar.update)
                    add_samples(config.out, task.name, name, answers)
                else:
                    bar.update(len(answers))
                results[task.name][name] = answers
    return results


def answer_arm(policy, task, arm, palette, config, progress):
    """The answers of one arm to the questions of one task."""
    rows = task.test[: config.questions]
    sampling = arm.sampling(config)
    n = arm.samples(config)
    seed = config.seed
    style = config.prompt
    return answer_questions(
        policy.decoder, policy.reader, task, rows, palette, sampling, n, seed, style, progress
    )


# ---- the samples on disk -------------------------------------------------------------------------


def open_samples(config, tasks):
    """Make --out ready. Returns the finished arms to go on from, {benchmark: {arm: samples}}.

    Those are the complete arms that an interrupted evaluation of the same settings left there.
    Without --resume it starts anew, and samples that are there are kept as samples.before.jsonl.
    ValueError if --resume meets an evaluation of other settings.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = vae_stage.result_settings(config)
    finished = {}
    if config.resume and (out / "config.json").is_file():
        before = read_json(out / "config.json")
        otherwise = "leave out --resume to start anew"
        vae_stage.require_same(f"{out} holds an evaluation", before, settings, otherwise)
        finished = finished_arms(config, tasks)
    elif (out / "samples.jsonl").is_file():
        os.replace(out / "samples.jsonl", out / "samples.before.jsonl")

    # without the arm in which it was stopped
    lines = []
    for benchmark, arms in finished.items():
        for arm, samples in arms.items():
            lines += sample_lines(benchmark, arm, samples)
    write_text(out / "samples.jsonl", "".join(lines))
    write_text(out / "config.json", json.dumps(settings, indent=1))
    return finished


def finished_arms(config, tasks):
    """{benchmark: {arm: samples}} of the arms in samples.jsonl that hold today's questions in full.

    Arms that are not asked for this time are kept, too.
    """
    finished = {}
    stored = read_samples(config.out)
    for task in tasks:
        once = []  # greedy has one sample a question
        each = []
        for row in task.test[: config.questions]:
            question = (question_key(row), row.get("answer"))
            once.append(question)
            each += [question] * config.samples

        finished[task.name] = {}
        for arm, samples in stored.get(task.name, {}).items():
            questions = [(s.get("question"), s.get("gold")) for s in samples]
            if questions in (once, each):
                finished[task.name][arm] = samples
    return finished


def read_samples(out):
    """{benchmark: {arm: samples}} of samples.jsonl in the folder `out`.

    A torn last line, without end of line, is left out. ValueError if it is none of ours.
    """
    path = Path(out) / "samples.jsonl"
    if not path.is_file():
        return {}
    results = {}
    complete_lines = path.read_text().split("\n")[:-1]
    for line in complete_lines:
        try:
            sample = json.loads(line)
            arms = results.setdefault(sample.pop("benchmark"), {})
            arms.setdefault(sample.pop("arm"), []).append(sample)
        except (ValueError, KeyError):
            raise ValueError(
                f"{path} is damaged, or of another version: choose another --out"
            ) from None
    return results


def sample_lines(benchmark, arm, samples):
    """The samples of an arm as lines of JSON."""
    return [json.dumps({"benchmark": benchmark, "arm": arm, **sample}) + "\n" for sample in samples]


def add_samples(out, benchmark, arm, samples):
    """Write the samples of an arm at the end of samples.jsonl."""
    with open(Path(out) / "samples.jsonl", "a") as file:
        file.writelines(sample_lines(benchmark, arm, samples))


# ---- from answers to figures ---------------------------------------------------------------------


def score(samples, ks, styles=()):
    """One arm on one benchmark, question by question, in the order of their rows.

    Returns {metric: [a value a question]}: pass@k; majority (maj@n); answers: how many different
    ones; samples: n; answered, undecided: shares, where the judge gives them; tokens: mean length;
    style X: shares, in the order of `styles`; follows: the share whose style is the domain that
    its latent comes from. Greedy without prefix has one sample a question; more would be the same,
    so its pass@k is its pass@1.
    """
    questions = {}
    for sample in samples:
        questions.setdefault(sample["row"], []).append(sample)
    if not any("style" in sample for sample in samples):
        styles = ()

    columns = {}
    for row in sorted(questions):
        for metric, value in score_question(questions[row], ks, styles).items():
            columns.setdefault(metric, []).append(value)
    if any(sample["gold"] in (None, "") for sample in samples):  # the judge alone knows
        columns.pop("majority")
    return columns


def score_question(samples, ks, styles):
    """`score` of one question: {metric: value}."""
    n = len(samples)
    first = samples[0]
    right = sum(sample["accuracy"] == 1 for sample in samples)
    votes = vote(sample["answer"] for sample in samples)

    values = {}
    for k in ks:
        values[f"pass@{k}"] = pass_at_k(n, right, k if n > 1 else 1)
    values["majority"] = majority(votes, first["gold"])
    values["answers"] = len(votes)
    values["samples"] = n
    for name in ("answered", "undecided", "tokens"):
        if name in first:
            values[name] = sum(sample[name] for sample in samples) / n

    for style in styles:
        values[f"style {style}"] = sum(sample.get("style") == style for sample in samples) / n
    if first.get("domain") in styles:
        follows = [sample.get("style") == sample["domain"] for sample in samples]
        values["follows"] = sum(follows) / n
    return values


def figures_of(scores, against):
    """scores: {arm: [its `score` on each benchmark]} -> {arm: {metric: (mean, standard error)}}.

    "difference" in an arm's figures is {metric: bootstrap} to the arm `against`, paired by
    question, where that arm is there: (mean, low, high).
    """
    figures = {}
    for arm, benchmarks in scores.items():
        figures[arm] = {}
        for metric in benchmarks[0]:
            if all(metric in columns for columns in benchmarks):
                values = [columns[metric] for columns in benchmarks]
                figures[arm][metric] = mean_and_error(*values)

        if against in scores and arm != against:
            differences = {}
            for metric in figures[arm]:
                if metric.startswith("pass@") or metric == "majority":
                    gaps = gaps_of(benchmarks, scores[against], metric)
                    differences[metric] = bootstrap(*gaps)
            figures[arm]["difference"] = differences
    return figures


def gaps_of(benchmarks, reference, metric):
    """One arm's value less another's, question by question: a list a benchmark."""
    gaps = []
    for columns, reference_columns in zip(benchmarks, reference):
        pairs = zip(columns[metric], reference_columns[metric])
        gaps.append([value - other for value, other in pairs])
    return gaps


def all_figures(results, ks, against, styles):
    """{benchmark: figures_of}, of each of its families too ("tiny/list"), and "average" of several.

    results: {benchmark: {arm: samples}}; styles: {benchmark: its styles in order}.
    """
    figures = {}
    scores = {}
    for name, arms in results.items():
        for part, samples_by_arm in {name: arms, **split_by_family(name, arms)}.items():
            scores[part] = {}
            for arm, samples in samples_by_arm.items():
                scores[part][arm] = [score(samples, ks, styles[name])]
            figures[part] = figures_of(scores[part], against)

    if len(results) > 1:
        averages = {}
        for arm in next(iter(results.values())):
            averages[arm] = []
            for name in results:
                averages[arm] += scores[name][arm]
        figures["average"] = figures_of(averages, against)
    return figures


def split_by_family(name, arms):
    """{"NAME/FAMILY": {arm: samples}} for each family that the questions of a benchmark name."""
    parts = {}
    for arm, samples in arms.items():
        for sample in sorted(samples, key=lambda sample: sample["row"]):
            if sample.get("family") is not None:
                part = parts.setdefault(f"{name}/{sample['family']}", {})
                part.setdefault(arm, []).append(sample)
    return parts


def powers(n):
    """1, 2, 4, ... up to n, and n itself."""
    smaller = [2**i for i in range(n.bit_length()) if 2**i < n]
    return [*smaller, n]


# ---- tables --------------------------------------------------------------------------------------


def cell(figures, metric, digits):
    """The mean of a metric as text; empty where an arm lacks it."""
    if metric not in figures:
        return ""
    mean, _ = figures[metric]
    return f"{mean:.{digits}f}"


def signed(difference):
    """A difference with its interval as text; empty for None."""
    if difference is None:
        return ""
    mean, low, high = difference
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def arms_table(figures, against, compare="pass@8"):
    """Rows of text, the head first: a few of each arm's figures, and the difference to `against`.

    compare: the metric of the difference; where there is no such, the largest pass@k.
    """
    metrics = next(iter(figures.values()))
    ks = [int(metric[5:]) for metric in metrics if metric.startswith("pass@")]
    if compare not in metrics:
        compare = f"pass@{max(ks)}"

    records = []
    for arm, row in figures.items():
        record = {"arm": arm}
        for k in ks:
            if k in (1, 8, max(ks)):
                record[f"pass@{k}"] = cell(row, f"pass@{k}", 3)
        if against in figures:
            difference = row.get("difference", {}).get(compare)
            record[f"{compare} against {against} [95%]"] = signed(difference)
        if "majority" in row:
            record["majority"] = cell(row, "majority", 3)
        record["answers"] = cell(row, "answers", 1)
        record["tokens"] = cell(row, "tokens", 1)
        record.update(shares_of(row))
        records.append(record)
    return table_of(records)


def shares_of(row):
    """The cells of an arm that only some tasks and arms have, {column: text}."""
    cells = {}
    if "answered" in row:
        answered, _ = row["answered"]
        cells["no answer"] = f"{1 - answered:.2f}"
    if "undecided" in row:
        cells["undecided"] = cell(row, "undecided", 2)
    styles = [metric[6:] for metric in row if metric.startswith("style ")]
    if styles:
        shares = [cell(row, f"style {style}", 2) for style in styles]
        cells[f"style {' / '.join(styles)}"] = " / ".join(shares)
    if "follows" in row:
        cells["follows domain"] = cell(row, "follows", 2)
    return cells


def table_of(records):
    """Dicts {column: text} as rows of text, the head first; a record may lack some columns."""
    columns = {}  # a dict keeps the order in which they first come up
    for record in records:
        columns.update(dict.fromkeys(record))
    table = [list(columns)]
    for record in records:
        table.append([record.get(column, "") for column in columns])
    return table


def markdown(table):
    """A table (rows of text, the head first) as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return "\n".join(lines)


def hardware(device):
    """One line on what the figures were measured on."""
    where = f"{os.cpu_count()} CPU cores"
    if str(device).startswith("cuda"):
        where = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{where}, {torch.get_num_threads()} threads, {versions}"


def save_results(config, tasks, results, note):
    """Score the samples; write results.json, results.md and the pictures, print the tables.

    Returns {benchmark: {arm: figures}}, see all_figures.
    """
    out = Path(config.out)
    styles = {task.name: task.styles for task in tasks}
    figures = all_figures(results, powers(config.samples), config.against, styles)
    benchmarks = list(results)
    if "average" in figures:
        benchmarks.append("average")

    text = ""
    for name in benchmarks:
        if len(benchmarks) > 1:
            text += f"{name}\n\n"
        text += markdown(arms_table(figures[name], config.against)) + "\n\n"
    summary = {"note": note, "arms": figures[benchmarks[-1]], "benchmarks": figures}
    write_text(out / "results.json", json.dumps(summary, indent=1))
    write_text(out / "results.md", f"{text}{note}\n")
    print(f"\n{text}{note}\nsaved {out}")

    for name in benchmarks:
        path = picture_path(out, "pass_at_k", name, len(benchmarks))
        draw_pass_at_k(figures[name], path)
    for task in tasks:
        if task.is_grounding:
            path = picture_path(out, "boxes", task.name, len(tasks))
            draw_boxes(task, results[task.name], path)
    return figures


# ---- control: losses under prefixes --------------------------------------------------------------

CONTROL_SOURCES = ("prior", "gauss", "noise", "own")  # beside none and every domain


def evaluate_control(config):
    """Measure control; write control.json and control.md, print the tables. Returns a Control.

    Traces are those that the VAE was trained on, of which every tenth is held out, or --traces.
    ValueError where they cannot be had, or a domain has none of them.
    """
    began = time.time()
    vae = load_vae(config)
    if vae is None:
        raise ValueError("--control measures what latents do: it needs a VAE, not --vae none")
    settings = read_json(Path(config.vae) / "config.json").get("settings", {})
    specs = config.traces or settings.get("traces")
    if not specs:
        raise ValueError(f"{config.vae} does not say on which traces: give them by --traces")
    traces = load_traces(specs, config.limit or settings.get("limit") or 2000)

    device = torch.device(device_of(config.device))
    model, reader = load_policy(config.model, device, getattr(torch, config.dtype))
    control = measure_control(
        model, reader, vae, traces, config.length, CONTROL_SOURCES, config.prompt, config.answers
    )
    if control is None:
        raise ValueError(
            f"a domain of the VAE ({', '.join(vae.domains)}) has no held-out trace: every tenth of "
            "the traces is held out, by its place among them; give more of each domain, mixed"
        )
    save_control(control, config, time.time() - began, device)
    return control


def save_control(control, config, seconds, device):
    """Write control.json and control.md, print the tables and the verdict."""
    figures = control_figures(control)
    records = []
    differences = []
    for domain, sources in figures["losses"].items():
        record = {"loss of": domain}
        difference = {"above none [95%]": domain}
        for source, values in sources.items():
            record[source] = f"{values['loss']:.3f}"
            if source != "none":
                difference[source] = interval(values["above_none"])
        records.append(record)
        differences.append(difference)

    lines = [f"a prefix of the own domain costs {interval(figures['cost'])} nats a token"]
    if "gain" in figures:
        gain = interval(figures["gain"])
        lines.append(f"latents of the own domain, not of the others: {gain} nats a token likelier")
    lines.append(control.verdict())
    note = (
        f"{config.model}: {config.answers} held-out answers a domain, L = {config.length}; "
        f"{date.today()}, {seconds:.0f} s on {hardware(device)}"
    )
    sentences = "".join(f"- {line}\n" for line in lines)
    tables = f"{markdown(table_of(records))}\n\n{markdown(table_of(differences))}"
    text = f"{tables}\n\n{sentences}\n{note}\n"

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "control.json", json.dumps({"note": note, **figures}, indent=1))
    write_text(out / "control.md", text)
    print(f"\n{text}saved {out}/control.json")


def control_figures(control: Control):
    """{losses: {domain: {source: {loss, above_none}}}, cost, gain}: all but losses are intervals.

    Intervals are (mean, low, high) of `bootstrap`, paired by answer. One domain has no gain.
    """
    figures = {"losses": {}}
    for domain, losses in control.losses.items():
        figures["losses"][domain] = {}
        for source, values in losses.items():
            mean, _ = mean_and_error(values)
            above_none = bootstrap(control.differences(domain, source))
            figures["losses"][domain][source] = {"loss": mean, "above_none": above_none}
    figures["cost"] = bootstrap(*control.costs())
    if control.gains():
        figures["gain"] = bootstrap(*control.gains())
    return figures


def interval(figure):
    """(mean, low, high) as text."""
    mean, low, high = figure
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


# ---- pictures ------------------------------------------------------------------------------------

# Okabe and Ito's colours, for every eye.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^v"
CONTROLS = ("greedy", "sampling", "noise", "gauss", "shuffled")  # dashed lines


def new_figure(width, height):
    """An empty matplotlib figure of so many inches, without pyplot and its global state.

    None where matplotlib is missing, with a line on how to get it.
    """
    try:
        from matplotlib.figure import Figure  # optional, and slow to load
    except ImportError:
        print('no pictures: matplotlib is missing (pip install -e ".[plots]")')
        return None
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_picture(figure, path):
    """Save a figure, and say where."""
    figure.savefig(path)
    print(f"picture {path}")


def picture_path(out, kind, benchmark, count):
    """KIND.png in the folder, or KIND-BENCHMARK.png if there are several benchmarks."""
    if count == 1:
        return out / f"{kind}.png"
    return out / f"{kind}-{benchmark.replace('/', '_')}.png"


def draw_pass_at_k(figures, path):
    """pass@k over k for every arm, controls dashed; greedy, with its one sample, is level."""
    figure = new_figure(7.5, 4.2)
    if figure is None:
        return
    axis = figure.subplots()
    for number, (arm, row) in enumerate(figures.items()):
        metrics = [metric for metric in row if metric.startswith("pass@")]
        ks = [int(metric[5:]) for metric in metrics]
        means = [row[metric][0] for metric in metrics]
        line = "--" if arm.removesuffix(" + sampling") in CONTROLS else "-"
        marker = MARKERS[number % len(MARKERS)]
        if arm == "greedy":
            marker = None
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(ks, means, line, marker=marker, color=colour, markersize=4, label=arm)

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="k (samples a question)", ylabel="pass@k", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    save_picture(figure, path)


# The arms of the paper's Table 2.
TABLE_2 = ("greedy", "sampling", "latent", "latent + sampling")


def draw_boxes(task, results, path, count=8, side=168):
    """Boxes on the first images (as Fig. 5), one row of pictures for each arm of Table 2.

    Green: the gold box; red: those of the arm's samples. A sample without a box draws nothing, so
    an arm of another format shows gold alone. results: {arm: samples}.
    """
    from PIL import Image, ImageDraw  # needed for tasks with images only

    arms = [arm for arm in TABLE_2 if arm in results] or list(results)
    rows = task.test[:count]
    margin = 110  # for the arms' names, in pixels
    sheet = Image.new("RGB", (margin + side * len(rows), side * len(arms)), "white")
    for i, arm in enumerate(arms):
        label = arm.replace(" + ", " +\n")
        ImageDraw.Draw(sheet).text((6, side * i + side // 2), label, fill="black")
        for j, row in enumerate(rows):
            completions = [s["completion"] for s in results[arm] if s["row"] == j]
            tile = boxes_tile(task, row, completions, side - 4)
            sheet.paste(tile, (margin + side * j, side * i))
    sheet.quantize().save(path)  # 256 colours: a third of the size
    print(f"picture {path}")


def boxes_tile(task, row, completions, side):
    """The image of a row as a square, with the boxes in these completions and the gold one."""
    from PIL import ImageDraw  # see draw_boxes

    image = open_image(row["image"])
    width, height = image.size
    if task.thousandths:
        width, height = 1000, 1000
    tile = image.resize((side, side))
    pen = ImageDraw.Draw(tile)

    boxes = [("red", parse_box(completion)) for completion in completions]
    boxes.append(("lime", parse_box(row["answer"])))
    for colour, box in boxes:
        if box is not None:
            x0, y0, x1, y1 = box
            corners = [x0 * side / width, y0 * side / height, x1 * side / width, y1 * side / height]
            pen.rectangle(corners, outline=colour, width=2)
    return tile


# ---- the whole evaluation ------------------------------------------------------------------------


@dataclass
class EvaluateConfig:
    """Settings of an evaluation; compare=False marks what does not change an answer."""

    # Model and data.
    model: str = HfArg(default=DEFAULT_WORLD, help="hub name, folder, run folder or a world")
    vae: str | None = HfArg(default=None, help="VAE folder, or none (default: the world's)")
    task: list[str] | None = HfArg(
        default=None, help="NAME, or NAME=SOURCE of its test rows (default: the world's)"
    )
    prompt: Literal[PROMPT_STYLES] = HfArg(default="auto", help="prompt format")
    questions: int = HfArg(default=64, help="test questions a task")
    out: str | None = HfArg(
        default=None, help="result folder (default: runs/WORLD/evaluation)", compare=False
    )

    # Arms.
    arms: list[str] = HfArg(
        default_factory=lambda: ["all"],
        help="greedy, sampling, noise, gauss, shuffled, latent, 'latent + sampling', a domain, ...",
        compare=False,
    )
    against: str = HfArg(default="sampling", help="reference of the differences", compare=False)
    samples: int = HfArg(default=32, help="samples a question in every arm but greedy")
    length: int = HfArg(default=8, help="prefix rows L")
    independent: bool = HfArg(default=False, help="L independent latents instead of one tiled")
    temperature: float = HfArg(default=1.0, help="of the sampling arms")
    top_p: float = HfArg(default=1.0, help="of the sampling arms; 1: off")
    top_k: int = HfArg(default=0, help="of the sampling arms; 0: off")
    max_new_tokens: int | None = HfArg(
        default=None, help="longest answer (default: the world's, 512 for other tasks)"
    )

    # Control, in place of the arms.
    control: bool = HfArg(
        default=False, help="measure the loss of answers under prefixes", compare=False
    )
    answers: int = HfArg(default=8, help="held-out answers a domain", compare=False)
    traces: list[str] | None = HfArg(
        default=None, help="[DOMAIN=]SOURCE (default: those of the VAE)", compare=False
    )
    limit: int | None = HfArg(
        default=None, help="traces kept per source (default: as the VAE)", compare=False
    )

    # Machine and seed.
    device: str = HfArg(default="auto", help="auto, cpu, cuda or mps", compare=False)
    dtype: Literal["float32", "bfloat16"] = HfArg(default="float32", help="of the weights")
    slots: int = HfArg(default=64, help="rows decoded at a time", compare=False)
    seed: int = HfArg(default=0, help="seed of prefixes and tokens")
    resume: bool = HfArg(default=False, help="go on with the one in --out", compare=False)

    def __post_init__(self):
        world = self.world()
        if self.task is None:
            self.task = [world]
        if self.vae is None:
            self.vae = f"{world_root(world)}/vae"
        if self.out is None:
            self.out = f"{world_root(world)}/evaluation"
        if self.max_new_tokens is None:
            self.max_new_tokens = 512
            if self.task == [world] or world_of(self.model) is not None:
                self.max_new_tokens = world_defaults(world).get("max_new_tokens", 512)

        require_at_least(self, questions=1, samples=1, length=0, slots=1, answers=1, limit=1)
        if self.control and self.length == 0:
            raise ValueError("--control measures what prefixes do: --length must be at least 1")
        if self.control and (self.prompt == "few-shot" or self.independent):
            raise ValueError("--control reads tiled prefixes and plain prompts, without examples")
        require_at_least(self, temperature=0, top_k=0, max_new_tokens=1)
        Sampling(self.temperature, self.top_p, self.top_k, max_new_tokens=self.max_new_tokens)
        self.sources()

    def world(self):
        """The world whose defaults hold: the model's, else a task's, else the default one."""
        for name in (self.model, *(self.task or ())):
            if world_of(name) is not None:
                return name
        return DEFAULT_WORLD

    def sources(self):
        """{task: where its test rows come from; None for its own} of --task NAME or NAME=SOURCE."""
        sources = {}
        benchmarks = set()
        for item in self.task:
            name, _, source = item.partition("=")
            benchmark = Path(name).name.removesuffix(".py")
            if benchmark in benchmarks or (benchmark == "average" and len(self.task) > 1):
                raise ValueError(f"--task {name}: each benchmark once, and none called average")
            benchmarks.add(benchmark)
            sources[name] = source or None
        return sources


def load_vae(config):
    """The VAE of an evaluation; a world's is trained where it is missing. None for --vae none."""
    if config.vae == "none":
        return None
    is_world = world_of(config.model) is not None
    if is_world and not (Path(config.vae) / "config.json").is_file():
        vae_config = vae_stage.VAEConfig(model=config.model, out=config.vae)
        vae_stage.train(vae_stage.resolve_world(vae_config))
    return VAE.load(config.vae)


def load_tasks(config):
    """The tasks with their test rows."""
    tasks = []
    for name, source in config.sources().items():
        task = load_task(name, test=source, splits=("test",))
        if not task.test:
            raise ValueError(f"the task '{name}' has no test rows: give --task {name}=FILE")
        tasks.append(task)
    return tasks


def load_tested(config):
    """The Policy under test. The arms are checked before the model is loaded."""
    vae = load_vae(config)
    choose_arms(config, vae)
    device = torch.device(device_of(config.device))
    model, reader = load_policy(config.model, device, getattr(torch, config.dtype))
    decoder = Decoder(model, end_ids(model, reader.tokenizer), config.slots)
    table = model.get_input_embeddings().weight.detach()
    return Policy(decoder, reader, table, vae)


def note_of(config, tasks, device, seconds):
    """One line on what was measured, and where."""
    asked = [f"{len(task.test[: config.questions])} questions of {task.name}" for task in tasks]
    tiling = "independent" if config.independent else "tiled"
    return (
        f"{config.model}: {', '.join(asked)} x {config.samples} samples, L = {config.length} "
        f"{tiling}, seed {config.seed}; {date.today()}, {seconds:.0f} s on {hardware(device)}"
    )


def evaluate(config):
    """Run the arms; save samples, figures, tables and pictures.

    Returns {benchmark: {arm: figures}}, see all_figures. ValueError, before any long work, for
    what cannot be evaluated.
    """
    began = time.time()
    tasks = load_tasks(config)
    policy = load_tested(config)
    results = run_arms(policy, tasks, config)
    note = note_of(config, tasks, policy.table.device, time.time() - began)
    return save_results(config, tasks, results, note)


def main(argv=None):
    """The command line."""
    config = vae_stage.parse_settings(EvaluateConfig, __doc__, argv)
    if config.control:
        return evaluate_control(config)
    return evaluate(config)


if __name__ == "__main__":
    vae_stage.run_main(main, "evaluate.py")
