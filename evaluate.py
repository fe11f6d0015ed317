"""Measuring what latents do: pass@k of several arms at an equal budget of samples, with controls, and the pictures.

An arm is a way to get n different answers to a question: sampling tokens, or greedy decoding under n different prefixes,
or both. The controls say where a gain comes from: `noise` is a random prefix with the norm of real tokens, `gauss` a prefix
from a Gaussian fitted to mean-pooled embeddings, without any VAE. pass@k is the unbiased estimator of Chen et al. 2021.

Departs from the paper: it evaluates each arm on its own benchmark and model; here all arms see the same questions, the same
policy and the same number of samples, and the standard error over questions stands beside each figure.

Run it (writes results.json, results.md, samples.jsonl, pass_at_k.png into --out):
    python evaluate.py                                               # the tiny base model (made where it is missing)
    python evaluate.py --model runs/tiny/sft                         # the same after the warm-up of `python grpo.py`
    python evaluate.py --model runs/qwen/sft --vae runs/qwen/vae --task gsm8k --questions 64 --samples 8
    python evaluate.py --curves runs/tiny/grpo-*                     # only draw the learning curves of runs
"""
import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from tqdm import tqdm

from prefix import Decoder, Palette, Sampling, end_ids, load_policy, texts_of
from rewards import PROMPT_STYLES, load_task, prompt_ids, stop_strings
from sft import Ranks, seed_of
from vae import find_model, find_vae, require_positive, run_main, write_text

# ---- estimators ---------------------------------------------------------------------------------------------------------


def pass_at_k(n, correct, k):
    """Probability that at least one of k samples, drawn without replacement from n of which `correct` are right, is right.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, Eq. 1); unbiased for the pass@k of fresh samples. Needs 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a question, there are {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mean_and_error(values):
    """Mean of a list and its standard error over questions (0 for a single one)."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


# ---- answering questions ------------------------------------------------------------------------------------------------

def answer(decoder, tokenizer, task, rows, palette, sampling, samples, seed, prompt_style="auto", progress=None):
    """`samples` judged answers to each of `rows`, each under a prefix of its own if a palette is given.

    Seeds depend on the question's text and the sample's number alone, so neither the order of the questions nor a split over
    ranks changes an answer. Returns one dict a sample: row (its question's number), question, gold, sample, completion, the
    task's rewards by name, finish, tokens, and style where the task names styles.
    """
    jobs = [(row, s) for row in rows for s in range(samples)]
    numbers = [number for number in range(len(rows)) for _ in range(samples)]
    prompts = {row["question"]: prompt_ids(row["question"], tokenizer, task.instruction, prompt_style) for row in rows}
    prefixes = palette and palette.draw([seed_of(seed, "prefix", row["question"], s) for row, s in jobs])[0]
    completions = decoder.generate([prompts[row["question"]] for row, _ in jobs], prefixes, sampling,
                                   [seed_of(seed, "token", row["question"], s) for row, s in jobs], progress)
    completions, texts = texts_of(completions, tokenizer, stop_strings(tokenizer, prompt_style))
    return [{"row": number, "question": row["question"], "gold": row["answer"], "sample": s, "completion": text,
             **task.judge(text, row["answer"], completion.finish), "finish": completion.finish, "tokens": len(completion.ids),
             **({"style": task.style(text)} if task.style else {})}
            for number, (row, s), completion, text in zip(numbers, jobs, completions, texts)]


def greedy_accuracy(decoder, tokenizer, task, args, ranks):
    """Greedy pass@1 without prefix on the first --eval-questions test rows, over all ranks: grpo.py's progress evaluation."""
    rows = ranks.own(task.test[:args.eval_questions])
    samples = answer(decoder, tokenizer, task, rows, None, Sampling(0.0, max_new_tokens=args.max_new_tokens), 1, 0, args.prompt)
    right, count = ranks.total([sum(sample["accuracy"] for sample in samples), len(samples)])
    return right / max(count, 1)


def arms_of(names, domains, temperature, with_vae=True):
    """{arm: (prefix source, temperature)}; names: "all", or some of them. Without a VAE three arms remain."""
    arms = {"greedy": ("none", 0.0), "sampling": ("none", temperature), "noise": ("noise", 0.0), "gauss": ("gauss", 0.0),
            "latent": ("prior", 0.0), "latent + sampling": ("prior", temperature)}
    arms.update({domain: (domain, 0.0) for domain in domains})
    arms = {name: arm for name, arm in arms.items() if with_vae or arm[0] in ("none", "noise")}
    if names == ["all"]:
        return arms
    unknown = [name for name in names if name not in arms]
    if unknown:
        raise ValueError(f"unknown arm '{unknown[0]}': choose from {', '.join(arms)}, or all")
    return {name: arms[name] for name in names}


def finished_arms(args, out, questions):
    """{arm: samples} that an interrupted evaluation of the same settings left in `out`; without --resume it starts anew."""
    path, config = out / "samples.jsonl", out / "config.json"
    free = ("resume", "device", "slots", "arms", "out", "curves")        # may differ
    settings = {name: value for name, value in vars(args).items() if name not in free}
    results = {}
    if args.resume and config.is_file() and path.is_file():
        before = json.loads(config.read_text())
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise ValueError(f"{out} holds an evaluation with another {', '.join(changed)} (was {before.get(changed[0])!r}, now "
                             f"{settings[changed[0]]!r}): choose another --out, or leave out --resume to start anew")
        for line in path.read_text().split("\n")[:-1]:              # a torn last line has no end of line
            sample = json.loads(line)
            results.setdefault(sample.pop("arm"), []).append(sample)
        full = {name: questions * (1 if name == "greedy" else args.samples) for name in results}
        results = {name: samples for name, samples in results.items() if len(samples) == full[name]}
    write_text(path, "".join(json.dumps({"arm": name, **s}) + "\n" for name, samples in results.items() for s in samples))
    write_text(config, json.dumps(settings, indent=1))
    return results


def run_arms(model, tokenizer, task, vae, args):
    """Answer --questions test rows in every arm, adding each arm's samples to samples.jsonl. Returns {arm: samples}."""
    rows = task.test[:args.questions]
    if not rows:
        raise ValueError(f"the task '{task.name}' has no test rows: give --test-data")
    decoder, table = Decoder(model, end_ids(model, tokenizer), args.slots), model.get_input_embeddings().weight.detach()
    plan = {}                                               # all arms are set up before the first one runs: errors come early
    for name, (source, temperature) in arms_of(args.arms, vae.domains if vae else (), args.temperature, vae is not None).items():
        palette = Palette(vae, table, source, args.length, not args.independent) if source != "none" else None
        sampling = Sampling(temperature, args.top_p, max_new_tokens=args.max_new_tokens)
        plan[name] = palette, sampling, 1 if palette is None and temperature == 0 else args.samples
    with tqdm(total=len(rows) * sum(samples for _, _, samples in plan.values()), desc="evaluate", unit="answer") as bar:
        results = finished_arms(args, Path(args.out), len(rows))
        for name, (palette, sampling, samples) in plan.items():
            bar.set_postfix_str(name)
            if name in results:
                bar.update(len(results[name]))
                continue
            results[name] = answer(decoder, tokenizer, task, rows, palette, sampling, samples, args.seed, args.prompt, bar.update)
            with open(Path(args.out) / "samples.jsonl", "a") as file:
                file.write("".join(json.dumps({"arm": name, **sample}) + "\n" for sample in results[name]))
    return {name: results[name] for name in plan}


def score(samples, ks):
    """The figures of one arm from its samples: {"pass@k": (mean, standard error), "answered": share, ...}.

    Greedy without prefix has one sample a question; more would be the same, so its pass@k is its pass@1.
    """
    by_question = {}
    for sample in samples:
        by_question.setdefault(sample["row"], []).append(sample)
    row = {}
    correct = [(len(group), int(sum(s["accuracy"] for s in group))) for group in by_question.values()]
    for k in ks:
        row[f"pass@{k}"] = mean_and_error([pass_at_k(n, right, k if n > 1 else 1) for n, right in correct])
    row["answered"] = sum(s["answered"] for s in samples) / len(samples)
    row["tokens"] = sum(s["tokens"] for s in samples) / len(samples)
    row["distinct"] = sum(len({s["completion"] for s in group}) / len(group) for group in by_question.values()) / len(by_question)
    row["samples"] = len(samples) // len(by_question)
    if "style" in samples[0]:
        row["styles"] = {style: sum(s["style"] == style for s in samples) / len(samples) for style in ("math", "code", "qa")}
    return row


def markdown(figures, ks):
    """The arms as a Markdown table."""
    styles = any("styles" in row for row in figures.values())
    head = ["arm", *(f"pass@{k}" for k in ks), "answered", "tokens", "distinct", *(["math / code / qa style"] if styles else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in figures.items():
        cells = [name, *("{:.3f} ± {:.3f}".format(*row[f"pass@{k}"]) for k in ks), f"{row['answered']:.2f}",
                 f"{row['tokens']:.1f}", f"{row['distinct']:.2f}"]
        cells += [" / ".join(f"{share:.2f}" for share in row["styles"].values())] if styles else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rl_table(root, name, folders):
    """The final accuracies of finished runs as Markdown: mean and spread over seeds for every schedule."""
    lines = ["| schedule | greedy pass@1 without prefix: start | end, by seed | mean | spread (std) |", "|---|---|---|---|---|"]
    table = {}
    for schedule, paths in folders.items():
        curves = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in paths]
        ends = [[row["eval_accuracy"] for row in curve if "eval_accuracy" in row] for curve in curves]
        final = torch.tensor([end[-1] for end in ends])
        spread = final.std().item() if len(final) > 1 else 0.0
        table[schedule] = {"start": ends[0][0], "end": final.tolist(), "mean": final.mean().item(), "std": spread}
        lines.append(f"| {name} {schedule} | {ends[0][0]:.3f} | {', '.join(f'{x:.3f}' for x in final.tolist())} "
                     f"| {final.mean():.3f} | {spread:.3f} |")
    write_text(root / f"{name}.json", json.dumps(table, indent=1))
    write_text(root / f"{name}.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


def hardware(device):
    """One line on what the figures were measured on."""
    where = torch.cuda.get_device_name() if str(device).startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


# ---- pictures -----------------------------------------------------------------------------------------------------------

def pyplot():
    """matplotlib's pyplot without a screen, or None with a line on how to get it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        return pyplot
    except ImportError:
        print('no pictures: matplotlib is missing (pip install -e ".[plots]")')


def draw_pass_at_k(results, path):
    """pass@k over k for every arm with more than one sample a question; greedy as a level line."""
    plt = pyplot()
    if plt is None:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    dashed = {"greedy", "sampling", "noise", "gauss"}               # without a latent: what the others are held against
    budget = max(score(samples, [1])["samples"] for samples in results.values())
    for name, samples in results.items():
        most = score(samples, [1])["samples"]
        ks = [2 ** i for i in range(most.bit_length())] if most > 1 else [1, budget]
        figures = score(samples, ks)
        axis.plot(ks, [figures[f"pass@{k}"][0] for k in ks], "--" if name in dashed else "-", marker="o" if most > 1 else None,
                  markersize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axis.set(xlabel="k (samples a question)", ylabel="pass@k", ylim=(0, 1.02))
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_curves(folders, path):
    """Learning curves of RL runs: reward of guided and unguided rollouts (running mean of 5 steps), and greedy accuracy without

    prefix. One colour for each schedule (the folder's name up to its seed), one line a seed.
    """
    plt = pyplot()
    if plt is None:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    titles = {"reward_guided": "reward of guided rollouts", "reward_unguided": "reward of unguided rollouts",
              "eval_accuracy": "greedy accuracy without prefix"}
    labels = list(dict.fromkeys(Path(folder).name.rsplit("-s", 1)[0] for folder in folders))
    for folder in folders:
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        label = Path(folder).name.rsplit("-s", 1)[0]
        for axis, name in zip(axes, titles):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if name != "eval_accuracy":                     # 64 rollouts a step are noisy
                last = [points[max(0, i - 4):i + 1] for i in range(len(points))]
                points = [(window[-1][0], sum(y for _, y in window) / len(window)) for window in last]
            axis.plot(*zip(*points) if points else ([], []), color=f"C{labels.index(label)}", alpha=0.8,
                      label=label if label not in axis.get_legend_handles_labels()[1] else None)
    for axis, title in zip(axes, titles.values()):
        axis.set(title=title, xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


# ---- command line -------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The flags; exits with status 2 and one sentence where they cannot be right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", default="tiny", help="hub name, folder, run folder or tiny (default: tiny)")
    data.add_argument("--vae", default="runs/tiny/vae", help="VAE folder, or none (default: runs/tiny/vae)")
    data.add_argument("--task", default="tiny", help="tiny, gsm8k, math, or a name for --test-data (default: tiny)")
    data.add_argument("--test-data", help="JSONL of {question, answer} or hub:DATASET:CONFIG:SPLIT (default: the task's own)")
    data.add_argument("--prompt", choices=PROMPT_STYLES, default="auto", help="prompt format (default: auto)")
    data.add_argument("--questions", type=int, default=64, help="test questions (default: 64)")
    data.add_argument("--out", default="runs/tiny/evaluation", help="where the results go (default: runs/tiny/evaluation)")
    arms = parser.add_argument_group("arms")
    arms.add_argument("--arms", nargs="+", default=["all"], metavar="ARM", help="greedy, sampling, noise, gauss, latent, "
                      "'latent + sampling', a domain, or all (default: all)")
    arms.add_argument("--samples", type=int, default=32, help="samples a question in every arm but greedy (default: 32)")
    arms.add_argument("--length", type=int, default=8, help="prefix rows L (default: 8)")
    arms.add_argument("--independent", action="store_true", help="L independent latents instead of one tiled (default: tiled)")
    arms.add_argument("--temperature", type=float, default=1.0, help="of the sampling arms (default: 1)")
    arms.add_argument("--top-p", type=float, default=1.0, help="of the sampling arms (default: 1, off)")
    arms.add_argument("--max-new-tokens", type=int, help="longest answer (default: 34 for tiny, else 512)")
    machine = parser.add_argument_group("machine and seed")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)")
    machine.add_argument("--slots", type=int, default=64, help="rows decoded at a time (default: 64)")
    machine.add_argument("--seed", type=int, default=0, help="seed of prefixes and tokens (default: 0)")
    machine.add_argument("--resume", action="store_true", help="go on with an interrupted evaluation of the same settings")
    parser.add_argument("--curves", nargs="+", metavar="RUN", help="only draw the learning curves of these RL runs")
    args = parser.parse_args(argv)
    args.max_new_tokens = args.max_new_tokens or (34 if args.task == "tiny" else 512)
    require_positive(parser, args, "questions", "samples", "slots", "max_new_tokens")
    return args


def main(argv=None):
    """Run the arms, save samples, figures, table and picture. Returns the figures by arm."""
    args = parse_args(argv)
    if args.curves:
        print("picture:", draw_curves(args.curves, Path(args.curves[0]).parent / "curves.png"))
        return
    task = load_task(args.task, test=args.test_data, splits=("test",))
    args.model = find_model(args.model)
    vae = None if args.vae == "none" else find_vae(args.vae, args.model)
    device = Ranks.start(args.device).device
    model, tokenizer = load_policy(args.model, device, getattr(torch, args.dtype))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    results = run_arms(model, tokenizer, task, vae, args)
    ks = [k for k in (1, 8, 32) if k <= args.samples]
    note = (f"{args.model} on {task.name}: {min(args.questions, len(task.test))} questions x {args.samples} samples, "
            f"L = {args.length} {'independent' if args.independent else 'tiled'}, seed {args.seed}, "
            f"{time.time() - began:.0f} s on {hardware(device)}")
    figures = {name: score(samples, ks) for name, samples in results.items()}
    write_text(out / "results.json", json.dumps({"note": note, "arguments": vars(args), "arms": figures}, indent=1))
    write_text(out / "results.md", f"{markdown(figures, ks)}\n\n{note}\n")
    picture = draw_pass_at_k(results, out / "pass_at_k.png")
    print(f"\n{markdown(figures, ks)}\n\n{note}\nsaved {out}" + (f", picture {picture}" if picture else ""))
    return figures


def close_rl(args, folders, policies, device):
    """The tables and pictures that close grpo.py's main job. args: grpo.py's; folders: {schedule: run folders}."""
    root = Path(args.out)
    if args.arms != ["none"]:
        policy = policies.get("prior", policies.get("none"))
        print(f"\nWhat prefixes do before RL (policy {policy}):", flush=True)
        main(["--model", policy, "--vae", args.vae, "--task", args.task, "--prompt", args.prompt, "--device", args.device,
              "--questions", str(args.arm_questions), "--samples", str(args.arm_samples), "--length", str(args.length),
              "--max-new-tokens", str(args.max_new_tokens), "--slots", str(args.slots), "--out", str(root / "evaluation"),
              "--arms", *args.arms, *(["--independent"] if args.independent else []),
              *(["--test-data", args.test_data] if args.test_data else [])])
    name = f"{args.algorithm}-{args.source}"
    picture = draw_curves([path for paths in folders.values() for path in paths], root / f"{name}.png")
    print(f"\nWhat injection does in RL ({args.steps} steps of {args.prompts} x {args.group} rollouts):\n")
    print(rl_table(root, name, folders))
    pictures = [str(path) for path in (picture, *sorted(root.glob("*/*.png"))) if path]
    print(f"\n{hardware(device)}\nmetrics and samples: {root}/{args.algorithm}-*\npictures: {' '.join(pictures) or 'none'}")


if __name__ == "__main__":
    run_main(main, "evaluate.py")
