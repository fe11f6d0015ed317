"""The paper's figures and tables in miniature, with controls and intervals, as one page.

A made-up world and a model of 0.4 million weights: the page shows the paper's numbers beside ours
for the pattern, and what speaks for the paper's account in this miniature, and what against it.

Three smaller jobs share its pieces:
  --sweep    evaluate along one axis at a time (prefix length, beta of the VAE, temperature, top-p);
  --analyse  the reward map, not in the paper: which region of latent space answers which questions,
             and does sampling z there help on *other* questions?
  --curves   draw the learning curves of some RL runs together.

Run it (about 12 minutes of processor time; the same command goes on where it was stopped):
    python tutorials/reproduce.py                                 # runs/reproduce/index.html
    python tutorials/reproduce.py --quick --out /tmp/quick        # hardly trained: checks the way
    python tutorials/reproduce.py --analyse --model runs/tiny/sft
    python tutorials/reproduce.py --sweep length=1,2,4,8 beta=0.5,1,4 --model runs/tiny/sft
    python tutorials/reproduce.py --curves runs/tiny/grpo-*-s*
"""

import base64
import copy
import html
import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import (
    COLOURS,
    MARKERS,
    EvaluateConfig,
    all_figures,
    answer_questions,
    arms_table,
    figures_of,
    load_tasks,
    load_tested,
    markdown,
    mean_and_error,
    new_figure,
    note_of,
    powers,
    prefix_seed,
    read_samples,
    run_arms,
    save_picture,
    save_results,
    score,
    signed,
    table_of,
)
from grpo import metrics_of, rl_figures, rl_rows
from prefix import Palette, Sampling
from rewards import DEFAULT_WORLD, world_domains
from vae import VAEConfig, parse_settings, pca, read_json, run_main, write_text
from vae import train as train_vae

ROOT = Path(__file__).resolve().parent.parent

# ---- settings ------------------------------------------------------------------------------------

# What can be swept, and the type of its values; beta is the VAE's, the others are EvaluateConfig's.
AXES = {"length": int, "beta": float, "temperature": float, "top_p": float}


@dataclass
class ReproduceConfig(EvaluateConfig):
    """Settings of the page, and of the three smaller jobs, which are evaluations."""

    out: str | None = HfArg(
        default=None,
        help="where results go (default: runs/reproduce; runs/WORLD/evaluation for other jobs)",
        compare=False,
    )
    arms: list[str] | None = HfArg(
        default=None,
        help="arms of evaluate.py (default: all; sampling, latent and both for --sweep)",
        compare=False,
    )

    # the page
    base_seed: int = HfArg(default=0, help="seed of the base model", compare=False)
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="RL seeds", compare=False)
    quick: bool = HfArg(default=False, help="hardly trained: checks the way", compare=False)

    # what to do instead
    sweep: list[str] | None = HfArg(
        default=None, help="AXIS=V,V ...: length, beta, temperature or top_p", compare=False
    )
    analyse: bool = HfArg(default=False, help="where latents are right", compare=False)
    curves: list[str] | None = HfArg(
        default=None, help="draw the learning curves of these RL runs", compare=False
    )

    def __post_init__(self):
        jobs = bool(self.sweep) + self.analyse + bool(self.curves)
        if jobs > 1:
            raise ValueError("--sweep, --analyse and --curves are jobs of their own: give one")
        if jobs == 0 and self.out is None:
            self.out = "runs/reproduce"
        if self.arms is None:
            self.arms = ["all"]
            if self.sweep:
                self.arms = ["sampling", "latent", "latent + sampling"]
        super().__post_init__()

        if self.analyse:
            self.check_analysis()
        if self.sweep:
            sweep_points(self)

    def check_analysis(self):
        """The reward map needs the arm `latent`, and one latent a sample."""
        if self.independent or self.vae == "none" or self.length == 0:
            raise ValueError(
                "--analyse needs a VAE and one latent a sample: drop --independent, --vae none or "
                "--length 0"
            )
        if self.arms != ["all"] and "latent" not in self.arms:
            self.arms = [*self.arms, "latent"]


# ---- sweeps --------------------------------------------------------------------------------------


@dataclass
class SweepPoint:
    """One evaluation of a sweep: all is as the flags say, but for one setting."""

    axis: str
    value: float
    config: ReproduceConfig


def sweep_points(config):
    """The SweepPoints of --sweep; ValueError for an axis or a value that cannot be."""
    points = []
    for item in config.sweep:
        axis, _, values = item.partition("=")
        if axis not in AXES:
            raise ValueError(
                f"--sweep takes AXIS=V,V with an axis of {', '.join(AXES)}, not {item}"
            )
        if axis == "beta" and config.vae == "none":
            raise ValueError("--sweep beta needs a VAE to vary: drop --vae none")
        for text in values.split(","):
            try:
                value = AXES[axis](text)
            except ValueError:
                raise ValueError(f"--sweep {item}: '{text}' is no value for {axis}") from None
            changes = {"sweep": None, "out": f"{config.out}/{axis}-{value:g}"}
            if axis == "beta":
                VAEConfig(beta=value)  # checks it
                changes["vae"] = f"{config.out}/vae-beta-{value:g}"
            else:
                changes[axis] = value
            points.append(SweepPoint(axis, value, replace(config, **changes)))
    return points


def sweep(config):
    """Evaluate along one axis at a time; each point is an evaluation of its own under --out.

    Along beta, a VAE like --vae but for its beta is trained for each point.
    """
    began = time.time()
    out = Path(config.out)
    tasks = load_tasks(config)
    styles = {task.name: task.styles for task in tasks}
    policy = load_tested(config)

    curves = {}  # axis -> value -> {arm: figures}
    table = []
    for point in sweep_points(config):
        vae = policy.vae
        if point.axis == "beta":
            vae = vae_of_beta(config.vae, point.config.vae, point.value)
        results = run_arms(replace(policy, vae=vae), tasks, point.config)
        figures = all_figures(results, powers(config.samples), config.against, styles)
        figures = figures.get("average", figures[tasks[0].name])
        curves.setdefault(point.axis, {})[point.value] = figures

        head, *rows = arms_table(figures, config.against)
        if not table:
            table.append(["axis", "value", *head])
        for row in rows:
            table.append([point.axis, f"{point.value:g}", *row])

    note = note_of(config, tasks, policy.table.device, time.time() - began)
    summary = {"note": note, "points": curves, "table": table}
    write_text(out / "sweep.json", json.dumps(summary, indent=1))
    text = f"{markdown(table)}\n\n{note}\n"
    write_text(out / "sweep.md", text)
    print(f"\n{text}saved {out}")
    draw_sweep(curves, out / "sweep.png")


def vae_of_beta(folder, out, beta):
    """A VAE trained with the settings of the one in `folder` but for its beta, kept in `out`."""
    settings = read_json(Path(folder) / "config.json").get("settings")
    if not settings:
        raise ValueError(f"{folder} does not say how it was trained: make it by vae.py")
    settings = {**settings, "beta": beta}
    return train_vae(VAEConfig(**settings, out=str(out)))


def draw_sweep(curves, path):
    """One panel an axis: pass@8 (or the largest k there is, if smaller) of each arm along it."""
    figure = new_figure(3.6 * len(curves) + 1.5, 3.4)
    if figure is None:
        return
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    labels = {"length": "prefix rows L", "beta": "beta of the VAE"}

    for panel, (axis, figures_by_value) in zip(panels, curves.items()):
        arms = next(iter(figures_by_value.values()))
        metrics = next(iter(arms.values()))
        ks = [int(metric[5:]) for metric in metrics if metric.startswith("pass@")]
        metric = f"pass@{max(k for k in ks if k <= 8)}"
        places = range(len(figures_by_value))
        for number, arm in enumerate(arms):
            points = [figures[arm][metric] for figures in figures_by_value.values()]
            means = [mean for mean, _ in points]
            errors = [error for _, error in points]
            marker = MARKERS[number % len(MARKERS)]
            colour = COLOURS[number % len(COLOURS)]
            panel.errorbar(
                places, means, errors, marker=marker, color=colour, ms=4, capsize=2, label=arm
            )
        names = [f"{value:g}" for value in figures_by_value]
        panel.set_xticks(places, names)
        panel.set(xlabel=labels.get(axis, axis), ylim=(0, 1.02))
        panel.grid(alpha=0.3)

    panels[0].set_ylabel(f"{metric} ± standard error")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=9)
    save_picture(figure, path)


# ---- where in latent space the right answers are -------------------------------------------------


@dataclass
class Halves:
    """The questions of a family, by their row: every other one is kept aside."""

    name: str
    learnt: set  # rows whose answers tell where latents are right
    kept_aside: set  # rows on which that is tried


def halves(task, questions):
    """The Halves of each family of the task's first questions, or of the whole without families."""
    rows_of_family = {}
    for number, row in enumerate(task.test[:questions]):
        rows_of_family.setdefault(row.get("family"), []).append(number)

    parts = []
    for family, numbers in rows_of_family.items():
        if len(numbers) < 2:
            raise ValueError(
                f"--analyse needs at least two questions of {family or task.name}: "
                "raise --questions"
            )
        name = task.name
        if family is not None:
            name = f"{task.name}/{family}"
        parts.append(Halves(name, set(numbers[::2]), set(numbers[1::2])))
    return parts


@dataclass
class RewardMap:
    """The latents of a family's answers, and how often each one's neighbours were right."""

    name: str
    z: torch.Tensor  # [N, k]
    share_right: torch.Tensor  # [N]


def analyse(config):
    """Evaluate the arms, then compare latents from where answers were right with the prior.

    Of each benchmark, or family where its questions have one, every other question is kept aside.
    From the rest come the z of the arm `latent` and whether each answer was right: a Gaussian of
    right z, the z whose neighbours were right most often, and the best domain. These answer the
    questions kept aside, against the prior.
    """
    began = time.time()
    out = Path(config.out)
    tasks = load_tasks(config)
    parts = {task.name: halves(task, config.questions) for task in tasks}
    policy = load_tested(config)
    results = run_arms(policy, tasks, config)
    note = note_of(config, tasks, policy.table.device, time.time() - began)
    figures = save_results(config, tasks, results, note)

    records = []
    maps = []
    for task in tasks:
        for part in parts[task.name]:
            reward_map = map_rewards(part, results[task.name], policy, config)
            maps.append(reward_map)
            records += compare_regions(part, reward_map, task, results[task.name], policy, config)

    table = table_of(records)
    write_text(out / "analysis.json", json.dumps({"table": table}, indent=1))
    write_text(out / "analysis.md", markdown(table) + "\n")
    print(f"\n{markdown(table)}\nsaved {out}")
    draw_reward_map(policy.vae, maps, out / "reward_map.png")
    return figures


def samples_of(results, arm, rows):
    """The samples of an arm to the questions in these rows."""
    return [sample for sample in results.get(arm, []) if sample["row"] in rows]


def map_rewards(part, results, policy, config):
    """The RewardMap of the questions to learn from. results: {arm: samples}."""
    prior = Palette(policy.vae, policy.table, "prior", config.length)
    latents = []
    right = []
    for sample in samples_of(results, "latent", part.learnt):
        seed = prefix_seed(config.seed, sample["question"], sample["sample"])
        latents.append(prior.draw(seed).latent)
        right.append(sample["accuracy"])
    z = torch.cat(latents)  # [N, k]
    return RewardMap(part.name, z, neighbourhood_mean(z, torch.tensor(right)))


def compare_regions(part, reward_map, task, results, policy, config):
    """How latents from where answers were right do on the questions kept aside: table records."""
    # What the questions to learn from say: the right z, the best place, the best domain.
    learnt = samples_of(results, "latent", part.learnt)
    is_right = torch.tensor([sample["accuracy"] for sample in learnt]) == 1  # [N]
    vae_of_right = fit_right(policy.vae, reward_map.z[is_right])
    best_z = reward_map.z[reward_map.share_right.argmax()]  # [k]
    best_domain = None
    most_right = -1
    for domain in policy.vae.domains:
        right = sum(sample["accuracy"] for sample in samples_of(results, domain, part.learnt))
        if right > most_right:
            best_domain = domain
            most_right = right

    # What each of them answers to the others.
    length = config.length
    fitted = Palette(vae_of_right, policy.table, "right answers", length)
    best = Palette(policy.vae, policy.table, "prior", length, z=best_z)
    rows = [task.test[number] for number in sorted(part.kept_aside)]
    samples = {
        "latent": samples_of(results, "latent", part.kept_aside),
        f"domain {best_domain}": samples_of(results, best_domain, part.kept_aside),
        "right answers": answer_greedily(policy, task, rows, fitted, config.samples, config),
        "best latent, one sample": answer_greedily(policy, task, rows, best, 1, config),
    }
    scores = {}
    for arm, answers in samples.items():
        if answers:  # the domain may not be among the arms
            scores[arm] = [score(answers, powers(config.samples), task.styles)]

    head, *table = arms_table(figures_of(scores, "latent"), "latent", "pass@1")
    records = []
    for row in table:
        record = {"questions kept aside": f"{part.name} ({len(part.kept_aside)})"}
        record.update(zip(head, row))
        records.append(record)
    return records


def answer_greedily(policy, task, rows, palette, samples, config):
    """The answers to these rows under prefixes of a palette, without sampling tokens."""
    decoder = policy.decoder
    reader = policy.reader
    sampling = Sampling(0.0, max_new_tokens=config.max_new_tokens)
    seed = config.seed
    return answer_questions(
        decoder, reader, task, rows, palette, sampling, samples, seed, config.prompt
    )


def neighbourhood_mean(z, values, neighbours=32):
    """Mean of values [N] over the nearest latents of each z [N, k], itself among them: [N]."""
    nearest = []
    for part in z.split(1024):
        distances = torch.cdist(part, z)  # [part, N]
        nearest.append(distances.topk(min(neighbours, len(z)), largest=False).indices)
    return values[torch.cat(nearest)].mean(1)  # [N, neighbours] -> [N]


def fit_right(vae, z):
    """The VAE with one domain, "right answers": a Gaussian over z [N, k].

    It is drawn to the prior by k pseudo-counts (our choice).
    """
    k = vae.latent
    mean = z.sum(0) / (len(z) + k)  # [k]
    centred = z - mean
    covariance = (centred.T @ centred + k * torch.eye(k)) / (len(z) + k)  # [k, k]

    fitted = copy.deepcopy(vae)
    fitted.domains = ["right answers"]
    fitted.domain_mean = mean[None]  # [1, k]
    fitted.domain_factor = torch.linalg.cholesky(covariance).T[None]  # eps @ A ~ N(0, A^T A)
    return fitted


def draw_reward_map(vae, maps, path):
    """Every z by the first two principal directions of the prefixes it decodes to, one panel a map.

    Colour: how often its neighbours in latent space were right. Crosses: the centres of the
    domains' Gaussians.
    """
    figure = new_figure(4.6 * len(maps) + 1, 4)
    if figure is None:
        return
    panels = figure.subplots(1, len(maps), sharex=True, sharey=True, squeeze=False)[0]

    prefixes = [vae.decode(reward_map.z) for reward_map in maps]
    prefixes.append(vae.decode(vae.domain_mean))
    sizes = [len(part) for part in prefixes]
    *clouds, centres = pca(torch.cat(prefixes)).split(sizes)  # [N, 2] each, [domains, 2]

    for panel, reward_map, cloud in zip(panels, maps, clouds):
        x, y = cloud.T
        dots = panel.scatter(x, y, c=reward_map.share_right, s=9, cmap="viridis", vmin=0, vmax=1)
        for domain, (x, y) in zip(vae.domains, centres.tolist()):
            panel.plot(x, y, "x", color=COLOURS[1], markersize=9, markeredgewidth=2.5)
            label = panel.annotate(domain, (x, y), (6, 6), textcoords="offset points")
            label.set(color=COLOURS[1], weight="bold")
            label.set_bbox({"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.8})
        panel.set_title(f"{reward_map.name}: {len(reward_map.z)} latents")
        panel.set(xlabel="1st principal direction", ylabel="2nd", xticks=[], yticks=[])
    figure.colorbar(dots, ax=panels, label="share right among the 32 nearest latents")
    save_picture(figure, path)


# ---- learning curves -----------------------------------------------------------------------------


def running_mean(values, width=5):
    """{step: value} -> {step: mean of the last `width` values up to there}, steps in order."""
    steps = sorted(values)
    means = {}
    for i, step in enumerate(steps):
        window = [values[s] for s in steps[max(0, i + 1 - width) : i + 1]]
        means[step] = sum(window) / len(window)
    return means


LINES = ["-", "--", ":", "-."]
# The panels of the picture: metric and title.
CURVES = {
    "reward_guided": "reward of guided rollouts",
    "reward_unguided": "reward of unguided rollouts",
    "eval_accuracy": "greedy accuracy without prefix",
}


def draw_curves(folders, path):
    """Learning curves of RL runs (as Fig. 6), one line for the runs that differ in the seed alone.

    Rewards of guided and unguided rollouts as running means of 5 steps, and the greedy accuracy
    without prefix. The line is the mean over seeds, its band goes from the least to the most.
    """
    figure = new_figure(13, 3.8)
    if figure is None:
        return
    panels = figure.subplots(1, len(CURVES), sharey=True)

    runs_by_line = {}  # folder name without the seed -> the metrics of each seed
    for folder in folders:
        folder = Path(folder).resolve()
        line = folder.with_name(folder.name.rsplit("-s", 1)[0])
        runs_by_line.setdefault(line, []).append(metrics_of(folder))
    parents = {line.parent for line in runs_by_line}

    for number, (line, runs) in enumerate(runs_by_line.items()):
        label = line.name
        if len(parents) > 1:  # runs of several --out are told apart by it
            label = f"{line.parent.name}/{line.name}"
        label += f" ({len(runs)} seeds)" if len(runs) > 1 else " (1 seed)"
        for panel, metric in zip(panels, CURVES):
            draw_line(panel, runs, metric, number, label)

    for panel, title in zip(panels, CURVES.values()):
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    low, high = panels[0].get_ylim()  # shared; penalties reach below 0, weighted sums above 1
    panels[0].set_ylim(min(low, -0.02), max(high, 1.02))
    panels[0].set_ylabel("mean over rollouts or questions")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    save_picture(figure, path)


def draw_line(panel, runs, metric, number, label):
    """One metric of runs that differ in the seed: their mean, in a band from least to most."""
    width = 1 if metric == "eval_accuracy" else 5  # the 64 rollouts of a step are noisy
    values_at = {}  # step -> the value of each run that has one there
    for rows in runs:
        values = {row["step"]: row[metric] for row in rows if row.get(metric) is not None}
        for step, mean in running_mean(values, width).items():
            values_at.setdefault(step, []).append(mean)

    steps = sorted(values_at)
    least = [min(values_at[step]) for step in steps]
    most = [max(values_at[step]) for step in steps]
    means = [sum(values_at[step]) / len(values_at[step]) for step in steps]
    colour = COLOURS[number % len(COLOURS)]
    panel.plot(steps, means, LINES[number % len(LINES)], color=colour, label=label)
    panel.fill_between(steps, least, most, color=colour, alpha=0.15, linewidth=0)


# ---- the page: what the paper says ---------------------------------------------------------------

# The paper's figures, by the name of our row: Table 1 (pass@8), 2 (pass@32), 3 (average pass@1).
PAPER_DOMAINS = {
    "code": ".708 / .430 / .945",
    "math": ".724 / .461 / .950",
    "qa": ".710 / .455 / .936",
}
PAPER_ARMS = {
    "greedy": ".020 / .020 / .047",
    "sampling": ".651 / .626 / .720",
    "latent": ".721 / .731 / .731",
    "latent + sampling": ".875 / .860 / .857",
}
PAPER_RL = {
    "grpo none": ".212 / .583 / .601",
    "grpo two-phase": ".229 / .608 / .606",
    "grpo linear": ".241 / .601 / .612",
    "rloo none": ".218 / .594 / .599",
    "rloo two-phase": ".228 / .607 / .623",
    "rloo linear": ".235 / .613 / .630",
}


@dataclass
class Section:
    """A section of the page."""

    title: str
    command: str  # its name in page_commands: what made the figures
    text: str
    table: str | None = None  # its name in page_tables
    picture: str | None = None  # its path in --out


CURVES_TEXT = (
    "Line: mean over seeds; band: lowest to highest. Paper: latent variants learn slower at first, "
    "then pass the baseline."
)
SECTIONS = (
    Section(
        "Is the gain really from the latent?",
        "page",
        "What speaks for the paper's account in this miniature, and what against. Arms: "
        "differences on the same questions, paired bootstrap 95% interval, no difference shown "
        "where it holds 0. RL: mean ± standard deviation over seeds, no difference shown where the "
        "means are closer than the root of the summed squares of the two.",
        table="verdicts",
    ),
    Section(
        "Figure 1: one noise token before the prompt",
        "noise-token",
        "A Gaussian vector with the norm of a token embedding before the prompt of the base model, "
        "greedy. Paper (Qwen3-4B-Base, GSM8K): pass@32 rises from .529 to .853.",
        table="noise-token",
        picture="noise-token/pass_at_k.png",
    ),
    Section(
        "Figure 3: latents and decoded prefixes",
        "grpo",
        "100 traces a domain, as in the paper; there as here they cluster by domain. (The domains "
        "of the tiny world differ in their words, so this is no surprise.)",
        picture="vae/latents.png",
    ),
    Section(
        "Table 1: the domain of the latents against the task",
        "arms",
        "pass@8, greedy, latents of one domain; controls: shuffled latents, and the prior "
        "(latent). The paper's model and tasks are others: compare the pattern, not the numbers.",
        table="domains",
    ),
    Section(
        "Table 2: sampling, latents, and both",
        "arms",
        "The paper's arms (Qwen2.5-VL-3B, pass@32) and controls: noise, gauss (a Gaussian on h, no "
        "VAE), shuffled. follows domain: share of answers in the style of their latent's domain.",
        table="arms",
        picture="arms/pass_at_k.png",
    ),
    Section(
        "Table 3: RL with injected latents",
        "grpo",
        "Greedy pass@1 without prefix; the paper's is the average over five benchmarks. ...-noise: "
        "the control, noise prefixes instead of latents.",
        table="rl",
    ),
    Section("Figure 6: learning curves of GRPO", "grpo", CURVES_TEXT, picture="grpo.png"),
    Section("Figure 6: learning curves of RLOO", "rloo", CURVES_TEXT, picture="rloo.png"),
    Section(
        "Which latents are right",
        "arms",
        "Not in the paper. On half of the questions a Gaussian is fitted to the z of right "
        "answers, and the z with the most successful neighbours is picked; the table shows both on "
        "the other half.",
        table="analysis",
        picture="arms/reward_map.png",
    ),
)


# ---- the page: commands --------------------------------------------------------------------------


def page_commands(config):
    """{name: command line}; the first makes the base, the VAE and the warm-ups of the others."""
    out = config.out
    seeds = [str(seed) for seed in config.seeds]
    grpo = ["grpo.py", "--base-seed", str(config.base_seed), "--seed", *seeds]
    grpo += ["--closing-questions", "0", "--resume", "--out", out]
    measure = ["--vae", f"{out}/vae", "--resume"]
    if config.quick:
        grpo += ["--base-steps", "60", "--sft-steps", "4", "--steps", "4"]
        grpo += ["--eval-questions", "16"]
        measure += ["--questions", "8", "--samples", "8"]
    else:
        measure += ["--questions", "128"]

    rloo = [*grpo, "--algorithm", "rloo"]
    noise = ["--schedule", "two-phase", "linear", "--source", "noise"]
    arms = ["tutorials/reproduce.py", "--analyse", *measure]
    arms += ["--model", f"{out}/sft", "--out", f"{out}/arms"]
    noise_token = ["evaluate.py", *measure, "--model", f"{out}/base", "--length", "1"]
    noise_token += ["--arms", "greedy", "sampling", "noise", "--out", f"{out}/noise-token"]
    return {
        "grpo": grpo,
        "rloo": rloo,
        "grpo-noise": [*grpo, *noise],
        "rloo-noise": [*rloo, *noise],
        "arms": arms,
        "noise-token": noise_token,
    }


def run_command(name, command, out):
    """Run one command on one thread, its output in OUT/logs/NAME.txt. Returns its minutes.

    It is not run again where it has finished. ValueError with its last line if it fails.
    """
    record = out / "logs" / f"{name}.json"
    log = out / "logs" / f"{name}.txt"
    if record.is_file():
        before = read_json(record)
        if before["command"] == command:
            return before["minutes"]

    began = time.time()
    print("python " + shlex.join(command), flush=True)
    script = str(ROOT / command[0])
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        job = subprocess.run(
            [sys.executable, script, *command[1:]], stdout=file, stderr=file, env=one_thread
        )
    if job.returncode != 0:
        lines = log.read_text().replace("\r", "\n").strip().split("\n")
        raise ValueError(
            f"{shlex.join(command)} failed ({lines[-1] or 'no output'}); see {log}; the same "
            "command goes on where it stopped"
        )
    minutes = (time.time() - began) / 60
    write_text(record, json.dumps({"command": command, "minutes": minutes}))
    return minutes


def make_page(config):
    """Every figure and table of the paper that the tiny world can show, on one HTML page."""
    out = Path(config.out)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    commands = page_commands(config)
    first, *others = commands
    minutes = run_command(first, commands[first], out)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run_command, name, commands[name], out) for name in others]
        for job in jobs:
            minutes += job.result()

    seeds = [str(seed) for seed in config.seeds]
    page_command = ["tutorials/reproduce.py", "--base-seed", str(config.base_seed)]
    commands["page"] = [*page_command, "--seeds", *seeds]
    note = (
        f"tiny world, base seed {config.base_seed}, RL seeds {' '.join(seeds)}; {date.today()}; "
        f"{os.cpu_count()} CPU cores, one thread a process, {minutes:.0f} process minutes in all; "
        f"torch {torch.__version__}"
    )
    tables = page_tables(out, config.seeds)
    sections = []
    for section in SECTIONS:
        entry = asdict(section)
        entry["command"] = "python " + shlex.join(commands[section.command])
        entry["rows"] = tables.get(section.table)
        sections.append(entry)

    write_text(out / "results.json", json.dumps({"note": note, "sections": sections}, indent=1))
    write_text(out / "index.html", page_html(sections, note, out))
    print(f"\n{markdown(tables['verdicts'])}\n\n{note}\nthe page: {out / 'index.html'}")


# ---- the page: tables ----------------------------------------------------------------------------


def page_tables(out, seeds):
    """{name: rows of text, the head first} from the folders that the commands filled.

    Also draws Fig. 6.
    """
    token = read_json(out / "noise-token" / "results.json")["arms"]
    arms = read_json(out / "arms" / "results.json")["benchmarks"]
    largest = [metric for metric in token["noise"] if metric.startswith("pass@")][-1]
    runs = rl_runs(out, seeds)

    domains = domain_rows(arms)
    all_arms = arms_table(arms[DEFAULT_WORLD], "sampling", largest)
    return {
        "verdicts": verdicts(out, runs),
        "noise-token": arms_table(token, "sampling", largest),
        "domains": beside_paper(domains, "paper: MATH500 / Olympiad / GSM8K", PAPER_DOMAINS),
        "arms": beside_paper(all_arms, "paper: RefCOCO / + / g", PAPER_ARMS),
        "rl": beside_paper(rl_rows(runs), "paper: 1.7B / 4B / 8B", PAPER_RL),
        "analysis": read_json(out / "arms" / "analysis.json")["table"],
    }


def beside_paper(table, title, paper):
    """A table with the paper's figures, {name of a row: text}, as its second column."""
    head, *rows = table
    wider = [[head[0], title, *head[1:]]]
    for name, *cells in rows:
        wider.append([name, paper.get(name, ""), *cells])
    return wider


def domain_rows(figures):
    """Table 1: pass@8 of latents of one domain on each family. figures: by benchmark."""
    families = [name for name in figures if "/" in name]
    table = [["latents of", *[f"ours, pass@8 on {name}" for name in families]]]
    for arm in (*PAPER_DOMAINS, "shuffled", "latent"):
        row = [arm]
        for name in families:
            mean, _ = figures[name][arm]["pass@8"]
            row.append(f"{mean:.3f}")
        table.append(row)
    return table


def rl_runs(out, seeds):
    """{"grpo two-phase": rl_figures, ...} of all RL runs; draws the curves of each algorithm."""
    runs = {}
    for algorithm in ("grpo", "rloo"):
        folders = []
        for kind in ("none", "two-phase", "linear", "two-phase-noise", "linear-noise"):
            paths = [out / f"{algorithm}-{kind}-s{seed}" for seed in seeds]
            runs[f"{algorithm} {kind}"] = rl_figures(paths)
            folders += paths
        draw_curves(folders, out / f"{algorithm}.png")
    return runs


@dataclass
class Comparison:
    """A question that two arms of an evaluation answer."""

    question: str
    folder: str
    arm: str
    other: str
    k: int | None = None  # of pass@k; None: as many as there are samples


COMPARISONS = (
    Comparison(
        "Does one noise token beat greedy decoding?",
        "noise-token",
        "noise",
        "greedy",
    ),
    Comparison(
        "Does it beat token sampling?",
        "noise-token",
        "noise",
        "sampling",
    ),
    Comparison(
        "Do latents with sampling beat sampling?",
        "arms",
        "latent + sampling",
        "sampling",
    ),
    Comparison(
        "Do they beat noise prefixes with sampling?",
        "arms",
        "latent + sampling",
        "noise + sampling",
        8,
    ),
    Comparison(
        "Is the VAE better than a plain Gaussian on h?",
        "arms",
        "latent",
        "gauss",
        8,
    ),
    Comparison(
        "Are latents better than shuffled ones?",
        "arms",
        "latent",
        "shuffled",
        8,
    ),
)


def verdicts(out, runs):
    """The questions that the controls answer: rows of question, figures, verdict.

    A verdict says whether these figures speak for the paper's account.
    """
    scores = {}
    for folder in ("noise-token", "arms"):
        scores[folder] = scores_of(out / folder)

    follows = {}
    for arm, (columns,) in scores["arms"].items():
        if "follows" in columns:
            follows[arm], _ = mean_and_error(columns["follows"])
    shares = [f"{arm} {share:.2f}" for arm, share in follows.items()]
    table = [
        ["question", "figures", "verdict"],
        [
            "Does the domain of a latent set the style of the answer?",
            "follows domain: " + ", ".join(shares),
            "for" if steers(follows) else "against",
        ],
    ]
    for comparison in COMPARISONS:
        table.append(comparison_row(comparison, scores[comparison.folder]))
    for algorithm in ("grpo", "rloo"):
        for kind in ("two-phase", "linear"):
            for other in ("none", f"{kind}-noise"):
                table.append(rl_verdict(runs, algorithm, kind, other))
    return table


def scores_of(folder):
    """{arm: [score]} of the evaluation in a folder, in the form of evaluate.figures_of."""
    samples_by_arm = read_samples(folder)[DEFAULT_WORLD]
    n = max(sample["sample"] for sample in samples_by_arm["sampling"]) + 1
    scores = {}
    for arm, samples in samples_by_arm.items():
        scores[arm] = [score(samples, powers(n), world_domains(DEFAULT_WORLD))]
    return scores


def steers(follows):
    """Whether latents of a domain set the style of nearly all answers, and shuffled ones do not.

    follows: {arm: share of answers in the style of their latent's domain}.
    """
    if follows["shuffled"] >= 0.6:
        return False
    return all(share >= 0.9 for arm, share in follows.items() if arm != "shuffled")


def verdict(low, high):
    """What a difference whose interval goes from low to high says of the paper's account."""
    if low > 0:
        return "for"
    if high < 0:
        return "against"
    return "no difference shown"


def comparison_row(comparison, scores):
    """The row of the verdicts for one Comparison. scores: see scores_of."""
    arm = comparison.arm
    other = comparison.other
    figures = figures_of({arm: scores[arm], other: scores[other]}, other)
    differences = figures[arm]["difference"]
    metric = f"pass@{comparison.k}"
    if comparison.k is None:
        metric = [name for name in differences if name.startswith("pass@")][-1]
    mean, low, high = differences[metric]
    text = f"{arm} against {other}, {metric}: {signed((mean, low, high))}"
    return [comparison.question, text, verdict(low, high)]


def rl_verdict(runs, algorithm, kind, other):
    """The row of the verdicts that compares two schedules. runs: {name: rl_figures}."""
    a = runs[f"{algorithm} {kind}"]
    b = runs[f"{algorithm} {other}"]
    gap = a["mean"] - b["mean"]
    spread = max(math.hypot(a["std"], b["std"]), 0.01)
    outcome = verdict(gap - spread, gap + spread)
    if len(a["end"]) == 1:
        outcome = "one seed shows nothing"
    ends = f"{a['mean']:.3f} ± {a['std']:.3f} against {b['mean']:.3f} ± {b['std']:.3f}"
    course = f"mean over the run {a['course']:.3f} against {b['course']:.3f}"
    question = f"RL with {algorithm}: is {kind} better than {other}?"
    return [question, f"{ends}; {course}", outcome]


# ---- the page: HTML ------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Reasoning Palette in miniature</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; color: #222 }}
body {{ padding: 0 1em }} .wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 12px; margin: 1em 0 }}
th, td {{ border: 1px solid #bbb; padding: 3px 5px; text-align: left }}
td {{ white-space: nowrap }} th {{ background: #eee }} img {{ max-width: 100% }}
code, .note {{ font-size: 13px; color: #555; overflow-wrap: anywhere }}
</style></head><body>
<h1>Reasoning Palette in miniature</h1>
<p>The figures and tables of arXiv 2512.17206 that a made-up world and a model of 0.4 million
weights can show, with controls. Numbers of the paper stand beside ours for the pattern; model,
tasks and scale are others.</p>
{body}
</body></html>
"""


def page_html(sections, note, folder):
    """The sections as one HTML page without any outside file: pictures are in it as base64."""
    parts = []
    for section in sections:
        title = html.escape(section["title"])
        parts.append(f"<h2>{title}</h2>\n<p>{html.escape(section['text'])}</p>")
        if section["rows"] is not None:
            parts.append(table_html(section["rows"]))
        if section["picture"] is not None and (folder / section["picture"]).is_file():
            png = base64.b64encode((folder / section["picture"]).read_bytes()).decode()
            parts.append(f'<img alt="{title}" src="data:image/png;base64,{png}">')
        command = html.escape(section["command"])
        parts.append(f'<p class="note"><code>{command}</code><br>{html.escape(note)}</p>')
    return PAGE.format(body="\n".join(parts))


def table_html(table):
    """Rows of text, the head first, as an HTML table."""
    lines = []
    tag = "th"
    for row in table:
        cells = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
        tag = "td"
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


# ---- command line --------------------------------------------------------------------------------


def reproduce(config):
    """Do the job that the settings ask for: the page, if they name no other."""
    if config.curves:
        draw_curves(config.curves, Path(config.curves[0]).parent / "curves.png")
    elif config.sweep:
        sweep(config)
    elif config.analyse:
        analyse(config)
    else:
        make_page(config)


def main(argv=None):
    """The command line."""
    reproduce(parse_settings(ReproduceConfig, __doc__, argv))


if __name__ == "__main__":
    run_main(main, "reproduce.py")
