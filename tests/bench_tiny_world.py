"""Does the tiny world show the paper's phenomena on most seeds? Each base seed x each RL seed.

For each base seed it runs the README's own command, `python grpo.py --base-seed B --seed ...`
(pretraining, VAE, warm-up from the posterior, RL under three schedules, arms), then
  - RL with noise prefixes, a control;
  - the paper's warm-up, from the prior, its arms, and RL from there;
  - RL in which a quarter of the rollouts stays guided;
  - whether latents still steer the policies after RL (first RL seed),
and prints the figures of all bases side by side. Nothing is picked: a base on which a claim fails
stands in the table like the others.

    python tests/bench_tiny_world.py           # 5 bases x 3 RL seeds, two processes of one thread
    python tests/bench_tiny_world.py --bases 0 --seeds 0        # one base: also "control after RL"
    python tests/bench_tiny_world.py --quick   # one base, hardly trained: checks the script only

Resumable: what is finished under --out is used as it is. Ends with one line of JSON. `--write` puts
the figures into tests/tiny_world.json and the table into README.md (a test checks that the two
agree).
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tutorials"))
from grpo import rl_figures
from reproduce import draw_curves, run_command
from tiny_world import STYLES

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- tests/bench_tiny_world.py --write -->", "<!-- end -->"
ARMS = ("greedy", "sampling", "noise", "gauss", "latent", "latent + sampling")
PASS = ("pass@1", "pass@8", "pass@32")
RARE = ("math", "code")  # the styles whose leak counts
SCHEDULES = ("none", "two-phase", "linear")
QUICK = {"--base-steps": 30, "--sft-steps": 2, "--steps": 2, "--eval-questions": 8}
FEW_GUIDED = "0:1,0.5:1,0.5:0.25"  # two-phase, but a quarter of the rollouts stays guided
# RL runs (of grpo.py, without their seed) whose policies are asked whether latents still steer them
AFTER_RL = {
    "two-phase": "grpo-two-phase",
    "linear": "grpo-linear",
    "two-phase, a quarter guided to the end": "grpo-rho0=1_0.5=1_0.5=0.25",
    "two-phase from the paper's warm-up": "grpo-two-phase-from-prior",
}


# ---- running ------------------------------------------------------------------------------------


def run_base(base, args, flags=(), controls=True):
    """All stages and RL runs of one base, each process on one thread. Returns their folder.

    flags: more of grpo.py's. controls: also run what is compared with it.
    """
    out = Path(args.out) / f"base-{base}"
    (out / "logs").mkdir(parents=True, exist_ok=True)
    seeds = [str(seed) for seed in args.seeds]
    command = ["grpo.py", "--base-seed", str(base), "--seed", *seeds, "--out", str(out)]
    command.append("--resume")
    arms = ["--closing-questions", "64"]
    if args.quick:
        arms = ["--closing-questions", "2"]
        for flag, value in QUICK.items():
            command += [flag, str(value)]
    command += flags
    run_command("latents", [*command, *arms], out)
    if controls:
        run_controls(command, arms, out, args)
    return out


def run_controls(command, arms, out, args):
    """What the latents of one base are compared with. command: its grpo.py; arms: flags of them."""
    no_arms = ["--closing-questions", "0"]
    noise = ["--schedule", "two-phase", "linear", "--source", "noise"]
    run_command("noise", [*command, *noise, *no_arms], out)
    paper = ["--warm-up", "prior", "--schedule", "two-phase"]
    run_command("paper", [*command, *paper, *arms], out)
    run_command("few-guided", [*command, "--schedule", FEW_GUIDED, *no_arms], out)

    size = ["--questions", "64", "--samples", "8"]
    if args.quick:
        size = ["--questions", "2", "--samples", "2"]
    runs = list(AFTER_RL.values())
    if args.quick:
        runs = runs[:1]
    for run in runs:
        measure = ["evaluate.py", "--model", f"{out}/{run}-s{args.seeds[0]}", "--vae", f"{out}/vae"]
        measure += ["--arms", "sampling", *STYLES, *size, "--out", f"{out}/after/{run}"]
        run_command(f"after-{run}", measure, out)


def run_bases(args, flags=(), controls=True):
    """{base seed: folder}, --jobs bases at a time."""

    def run(base):
        return run_base(base, args, flags, controls)

    with ThreadPoolExecutor(args.jobs) as pool:
        folders = pool.map(run, args.bases)
        return dict(zip(args.bases, folders))


# ---- figures ------------------------------------------------------------------------------------


def read_figures(out, rare=RARE, domains=STYLES):
    """One base's figures from its result files. rare: the styles whose leak counts."""
    figures = {"leak": {}, "arms": {}, "control": {}}
    lines = (out / "base" / "metrics.jsonl").read_text().splitlines()
    pretraining = json.loads(lines[-1])
    for style in rare:
        figures["leak"][style] = pretraining[f"leak_{style}"]

    figures["arms"] = read_arms(out / "evaluation", domains)
    figures["control"] = control_of(figures["arms"], domains)
    figures["rl"] = read_runs(out, {name: f"grpo-{name}" for name in SCHEDULES})
    return figures


def read_runs(out, runs):
    """{name: rl_figures over the seeds} of runs {name: its folder without the seed}."""
    figures = {}
    for name, run in runs.items():
        figures[name] = rl_figures(sorted(out.glob(f"{run}-s[0-9]*")))
    return figures


def read_arms(folder, domains):
    """{arm: {pass@k: (mean, standard error), "styles": {style: share}}} of one evaluation."""
    arms = {}
    results = json.loads((folder / "results.json").read_text())
    for name, row in results["arms"].items():
        arm = {key: row[key] for key in PASS if key in row}
        arm["styles"] = {}
        for style in domains:
            arm["styles"][style] = row[f"style {style}"][0]
        arms[name] = arm
    return arms


def control_of(arms, domains):
    """{domain: share of the answers under its latents that have its style}."""
    return {domain: arms[domain]["styles"][domain] for domain in domains}


def read_controls(out):
    """The figures of run_controls, {name: figures}."""
    noise = {name: f"grpo-{name}-noise" for name in ("two-phase", "linear")}
    figures = {"rl_noise": read_runs(out, noise)}
    others = list(AFTER_RL)[2:]
    figures["rl"] = read_runs(out, {name: AFTER_RL[name] for name in others})
    paper = read_arms(out / "evaluation-from-prior", STYLES)
    figures["paper"] = {"control": control_of(paper, STYLES), "arms": paper}
    figures["after_rl"] = {}
    for name, run in AFTER_RL.items():
        folder = out / "after" / run
        if folder.is_dir():  # --quick leaves most of them out
            figures["after_rl"][name] = control_of(read_arms(folder, STYLES), STYLES)
    return figures


def rl_cell(runs):
    """The end of one schedule's RL runs: mean, and standard deviation of several."""
    text = f"{runs['mean']:.3f}"
    if len(runs["end"]) > 1:
        text += f" ± {runs['std']:.3f}"
    return text


def rows_of_base(figures, arms):
    """{name of a table row: its cell} of one base."""
    rows = {}
    leak = figures["leak"]
    names = " / ".join(leak)
    shares = [f"{share:.3%}" for share in leak.values()]
    rows[f"leak of {names} without context"] = " / ".join(shares)
    control = figures["control"]
    domains = " / ".join(control)
    rows[f"style follows domain, L = 8 ({domains})"] = shares_cell(control)
    if "paper" in figures:
        paper = figures["paper"]
        rows["the same after the paper's warm-up"] = shares_cell(paper["control"])
        title = f"answers sampled without prefix in style {names}"
        rows[title] = leak_cell(figures["arms"], leak)
        rows[f"{title}, after the paper's warm-up"] = leak_cell(paper["arms"], leak)
    for arm in arms:
        values = {}
        for name, value in figures["arms"][arm].items():
            if name.startswith("pass@"):
                values[name] = f"{value[0]:.2f}"
        rows[f"{arm}: {' / '.join(values)}"] = " / ".join(values.values())
    for title, key in (("RL", "rl"), ("RL, noise prefixes", "rl_noise")):
        for schedule, runs in figures.get(key, {}).items():
            rows[f"{title} {schedule}"] = rl_cell(runs)
    for run, shares in figures.get("after_rl", {}).items():
        rows[f"style follows domain after RL {run}"] = shares_cell(shares)
    return rows


def shares_cell(shares):
    return " / ".join(f"{share:.2f}" for share in shares.values())


def leak_cell(arms, rare):
    """How often answers that are sampled without prefix have the rare styles."""
    styles = arms["sampling"]["styles"]
    return " / ".join(f"{styles[style]:.2%}" for style in rare)


def markdown_row(name, cells):
    return f"| {name} | {' | '.join(cells)} |"


def table(figures, arms=ARMS):
    """Markdown: one column a base."""
    columns = [rows_of_base(base, arms) for base in figures.values()]
    seeds = [str(base) for base in figures]
    lines = [markdown_row("base seed", seeds), "|---|" + "---|" * len(seeds)]
    for name in columns[0]:
        cells = [column[name] for column in columns]
        lines.append(markdown_row(name, cells))
    return "\n".join(lines)


def claims_of_base(figures):
    """{claim of the README: whether it holds} on one base."""
    pass8 = {arm: figures["arms"][arm]["pass@8"][0] for arm in ARMS}
    latent_runs = figures["rl"]["two-phase"]
    noise_runs = figures["rl_noise"]["two-phase"]
    none = figures["rl"]["none"]["mean"]
    linear = figures["rl"]["linear"]["mean"]
    two_phase = latent_runs["mean"]

    claims = {}
    claims["every domain steers >= 95%"] = min(figures["control"].values()) >= 0.95
    steers = min(figures["paper"]["control"].values()) >= 0.95
    claims["every domain steers >= 95% after the paper's warm-up"] = steers
    styles = figures["arms"]["sampling"]["styles"]
    leak = max(styles[style] for style in RARE)
    claims["at most 0.3% of answers without prefix in a rare style"] = leak <= 0.003
    is_ordered = pass8["latent + sampling"] > pass8["sampling"] > pass8["greedy"]
    claims["pass@8: latent + sampling > sampling > greedy"] = is_ordered
    claims["RL: two-phase > none"] = two_phase > none
    claims["RL: linear > none"] = linear > none
    is_near = abs(pass8["gauss"] - pass8["latent"]) < 0.05
    claims["against us: gauss within 0.05 of latent on pass@8"] = is_near
    noise = "against us: RL with noise prefixes (two-phase)"
    claims[f"{noise} within 0.05 of latents"] = noise_runs["mean"] > two_phase - 0.05
    is_sooner = noise_runs["course"] > latent_runs["course"]
    claims[f"{noise} learns sooner: a higher mean over the run's evaluations"] = is_sooner
    for run, shares in figures["after_rl"].items():
        claims[f"after RL {run}: every domain steers >= 95%"] = min(shares.values()) >= 0.95
    return claims


def count_claims(figures, claims=claims_of_base):
    """{claim: on how many bases it holds}. claims(figures of one base) -> {claim: bool}."""
    counts = {}
    for base in figures.values():
        for name, holds in claims(base).items():
            counts[name] = counts.get(name, 0) + holds
    return counts


def page(figures, note, counts=None, arms=ARMS):
    """What stands in README.md: the table, the count of every claim, and how it was measured."""
    if counts is None:
        counts = count_claims(figures)
    lines = [table(figures, arms), ""]
    for name, count in counts.items():
        lines.append(f"- {name}: on {count} of {len(figures)} bases")
    return "\n".join([*lines, "", note])


# ---- writing ------------------------------------------------------------------------------------


def replace_between(path, start, end, text):
    """Put text between the two markers of a page."""
    before, rest = path.read_text().split(start)
    after = rest.split(end)[1]
    path.write_text(f"{before}{start}\n{text}\n{end}{after}")


def write_json(name, figures, note):
    content = json.dumps({"note": note, "figures": figures}, indent=1)
    (ROOT / "tests" / name).write_text(content + "\n")


def write(figures, note, folder):
    """The part of README.md between the markers, the JSON that it is checked against, and the
    pictures of the first base, which lie in `folder`."""
    write_json("tiny_world.json", figures, note)
    pictures = ROOT / "tutorials"
    shutil.copy(folder / "evaluation" / "pass_at_k.png", pictures / "tiny_world_pass_at_k.png")
    shutil.copy(folder / "vae" / "latents.png", pictures / "tiny_world_latents.png")
    runs = []
    for schedule in SCHEDULES:
        runs += sorted(folder.glob(f"grpo-{schedule}-s*"))
    draw_curves(runs, pictures / "tiny_world_learning_curves.png")
    replace_between(ROOT / "README.md", START, END, page(figures, note))


# ---- command line -------------------------------------------------------------------------------


def parse_args(doc, seeds, out):
    """The flags of both bench scripts; seeds, out: defaults."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    bases = [0, 1, 2, 3, 4]
    parser.add_argument("--bases", type=int, nargs="+", default=bases, help="seeds (0 1 2 3 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help=f"RL seeds ({seeds})")
    parser.add_argument("--jobs", type=int, default=2, help="bases at a time (2)")
    parser.add_argument("--out", default=out, help=f"where everything goes ({out})")
    parser.add_argument("--write", action="store_true", help="put the figures into the documents")
    parser.add_argument("--quick", action="store_true", help="one base, hardly trained")
    args = parser.parse_args()
    if args.quick:
        args.bases = [0]
        args.seeds = [0]
        args.out += "-quick"
    return args


def main():
    args = parse_args(__doc__, seeds=[0, 1, 2], out="runs/tiny-world")
    began = time.time()
    folders = run_bases(args)
    minutes = (time.time() - began) / 60

    figures = {}
    for base, folder in folders.items():
        figures[str(base)] = read_figures(folder)
        controls = read_controls(folder)
        figures[str(base)]["rl"].update(controls.pop("rl"))
        figures[str(base)].update(controls)
    note = (
        f"{len(args.bases)} bases x {len(args.seeds)} RL seeds; {os.cpu_count()} CPU cores, "
        f"{args.jobs} processes of one thread, {minutes:.0f} minutes; {date.today()}; "
        "mean ± standard deviation over RL seeds."
    )
    print(page(figures, note))
    if args.write:
        write(figures, note, folders[args.bases[0]])
    print(json.dumps({"claims": count_claims(figures), "bases": figures}))


if __name__ == "__main__":
    main()
