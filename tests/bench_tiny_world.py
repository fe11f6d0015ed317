"""Does the tiny world show the paper's phenomena on most seeds? Each base seed x each RL seed.

For each base seed it runs the README's own command, `python grpo.py --base-seed B --seed ...`
(pretraining, VAE, warm-up, RL under three schedules, arms), then RL with noise prefixes as a
control, and prints the figures of all bases side by side. Nothing is picked: a base on which a
claim fails stands in the table like the others.

    python tests/bench_tiny_world.py           # 5 bases x 3 RL seeds, two processes of one thread
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
from reproduce import run_command
from tiny_world import STYLES

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- tests/bench_tiny_world.py --write -->", "<!-- end -->"
ARMS = ("greedy", "sampling", "noise", "gauss", "latent", "latent + sampling")
PASS = ("pass@1", "pass@8", "pass@32")
RARE = ("math", "code")  # the styles whose leak counts
QUICK = {"--base-steps": 60, "--steps": 4, "--eval-questions": 16, "--closing-questions": 8}


# ---- running ------------------------------------------------------------------------------------


def run_base(base, args, flags=(), noise=True):
    """All stages and RL runs of one base, each process on one thread. Returns their folder.

    flags: more of grpo.py's. noise: also run RL with noise prefixes.
    """
    out = Path(args.out) / f"base-{base}"
    (out / "logs").mkdir(parents=True, exist_ok=True)
    seeds = [str(seed) for seed in args.seeds]
    command = ["grpo.py", "--base-seed", str(base), "--seed", *seeds, "--out", str(out)]
    command.append("--resume")
    if args.quick:
        for flag, value in QUICK.items():
            command += [flag, str(value)]
    command += flags
    run_command("latents", command, out)
    if noise:
        control = ["--schedule", "two-phase", "linear", "--source", "noise"]
        no_arms = ["--closing-questions", "0"]
        run_command("noise", [*command, *control, *no_arms], out)
    return out


def run_bases(args, flags=(), noise=True):
    """{base seed: folder}, --jobs bases at a time."""

    def run(base):
        return run_base(base, args, flags, noise)

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

    results = json.loads((out / "evaluation" / "results.json").read_text())
    for name, row in results["arms"].items():
        arm = {key: row[key] for key in PASS if key in row}
        arm["styles"] = {}
        for style in domains:
            arm["styles"][style] = row[f"style {style}"][0]
        figures["arms"][name] = arm
    for domain in domains:
        figures["control"][domain] = figures["arms"][domain]["styles"][domain]

    figures["rl"] = json.loads((out / "grpo-prior.json").read_text())
    noise = out / "grpo-noise.json"
    if noise.is_file():
        figures["rl_noise"] = json.loads(noise.read_text())
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
    shares = [f"{share:.3%}" for share in leak.values()]
    rows[f"leak of {' / '.join(leak)} without context"] = " / ".join(shares)
    control = figures["control"]
    shares = [f"{share:.2f}" for share in control.values()]
    rows[f"style follows domain, L = 8 ({' / '.join(control)})"] = " / ".join(shares)
    for arm in arms:
        values = {}
        for name, value in figures["arms"][arm].items():
            if name.startswith("pass@"):
                values[name] = f"{value[0]:.2f}"
        rows[f"{arm}: {' / '.join(values)}"] = " / ".join(values.values())
    for title, key in (("RL", "rl"), ("RL, noise prefixes", "rl_noise")):
        for schedule, runs in figures.get(key, {}).items():
            rows[f"{title} {schedule}"] = rl_cell(runs)
    return rows


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
    claims["every domain steers >= 90%"] = min(figures["control"].values()) >= 0.9
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
    for source, picture in (
        ("evaluation/pass_at_k.png", "pass_at_k.png"),
        ("grpo-prior.png", "learning_curves.png"),
        ("vae/latents.png", "latents.png"),
    ):
        shutil.copy(folder / source, ROOT / "tutorials" / f"tiny_world_{picture}")
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
