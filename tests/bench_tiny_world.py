"""Does the tiny world show the paper's phenomena on most seeds? Every base seed x every RL seed, with controls.

For each base seed it runs the README's own command, `python grpo.py --base-seed B --seed ...` (pretraining, VAE, warm-up,
arms, RL under three schedules), then RL with noise prefixes as a control, and prints the figures of all bases side by side.
Nothing is picked: a base on which a claim fails stands in the table like the others.

    python tests/bench_tiny_world.py                  # 5 bases x 3 RL seeds, two processes of one thread
    python tests/bench_tiny_world.py --quick          # one base, hardly trained: checks the script, not the claims

Resumable: what is finished under --out is used as it is. Ends with one line of JSON. `--write` puts the figures into
tests/tiny_world.json and the table into README.md (a test checks that the two agree).
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import run_command            # noqa: E402
from rewards import STYLES                  # noqa: E402

START, END = "<!-- tests/bench_tiny_world.py --write -->", "<!-- end -->"
ARMS = ("greedy", "sampling", "noise", "gauss", "latent", "latent + sampling")


def run_base(base, args, flags=(), noise=True):
    """All stages and all RL runs of one base, each process on one thread. flags: more of grpo.py's. Returns their folder."""
    out = Path(args.out) / f"base-{base}"
    common = ["grpo.py", "--base-seed", str(base), "--seed", *map(str, args.seeds), "--out", str(out), "--resume"]
    if args.quick:
        common += ["--base-steps", "60", "--steps", "4", "--eval-questions", "16", "--arm-questions", "8", "--arm-samples", "8"]
    common += flags
    (out / "logs").mkdir(parents=True, exist_ok=True)
    run_command("latents", common, out)
    if noise:
        run_command("noise", [*common, "--schedule", "two-phase", "linear", "--source", "noise", "--arms", "none"], out)
    return out


def read(out, rare=("math", "code"), domains=STYLES):
    """One base's figures from its result files. rare: the styles whose leak counts."""
    load = lambda name: json.loads((out / name).read_text())
    pretraining = [json.loads(line) for line in (out / "base" / "metrics.jsonl").read_text().splitlines()][-1]
    kept = ("pass@1", "pass@8", "pass@32")
    arms = {name: {**{key: row[key] for key in kept if key in row}, "styles": {style: row[f"style {style}"][0] for style in domains}}
            for name, row in load("evaluation/results.json")["arms"].items()}
    return {"leak": {style: pretraining[f"leak_{style}"] for style in rare}, "arms": arms,
            "control": {domain: arms[domain]["styles"][domain] for domain in domains},
            "rl": load("grpo-prior.json"), **({"rl_noise": load("grpo-noise.json")} if (out / "grpo-noise.json").is_file() else {})}


def table(figures, arms=ARMS):
    """Markdown: one column a base."""
    bases = list(figures)
    lines = ["| base seed | " + " | ".join(map(str, bases)) + " |", "|---|" + "---|" * len(bases)]
    add = lambda name, cell: lines.append(f"| {name} | " + " | ".join(cell(figures[base]) for base in bases) + " |")
    first = figures[bases[0]]
    add(f"leak of {' / '.join(first['leak'])} without context", lambda f: " / ".join(f"{share:.3%}" for share in f["leak"].values()))
    add(f"style follows domain, L = 8 ({' / '.join(first['control'])})", lambda f: " / ".join(f"{share:.2f}" for share in f["control"].values()))
    for arm in arms:
        ks = [name for name in first["arms"][arm] if name.startswith("pass@")]
        add(f"{arm}: {' / '.join(ks)}", lambda f: " / ".join(f"{f['arms'][arm][k][0]:.2f}" for k in ks))
    for name, key in (("RL", "rl"), ("RL, noise prefixes", "rl_noise")):
        for schedule in first.get(key, ()):
            add(f"{name} {schedule}", lambda f: f"{f[key][schedule]['mean']:.3f}" + (
                f" ± {f[key][schedule]['std']:.3f}" if len(f[key][schedule]["end"]) > 1 else ""))
    return "\n".join(lines)


def page(figures, note, counts=None, arms=ARMS):
    """What stands in README.md: the table, the count of every claim, and how it was measured."""
    counts = [f"- {name}: on {count} of {len(figures)} bases" for name, count in (counts or claims(figures)).items()]
    return "\n".join([table(figures, arms), "", *counts, "", note])


def write(figures, note, out):
    """Replace the part of README.md between the markers, the JSON that it is checked against, and the first base's pictures."""
    (ROOT / "tests" / "tiny_world.json").write_text(json.dumps({"note": note, "figures": figures}, indent=1) + "\n")
    for name, picture in (("evaluation/pass_at_k.png", "pass_at_k.png"), ("grpo-prior.png", "learning_curves.png"),
                          ("vae/latents.png", "latents.png")):
        shutil.copy(out / f"base-{next(iter(figures))}" / name, ROOT / "tutorials" / f"tiny_world_{picture}")
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(before + START + "\n" + page(figures, note) + "\n" + END + rest.split(END)[1])


def claims(figures):
    """On how many bases each claim of the README holds."""
    k = lambda f, arm: f["arms"][arm].get("pass@8", [0])[0]
    tests = {
        "every domain steers >= 90%": lambda f: min(f["control"].values()) >= 0.9,
        "pass@8: latent + sampling > sampling > greedy": lambda f: k(f, "latent + sampling") > k(f, "sampling") > k(f, "greedy"),
        "RL: two-phase > none": lambda f: f["rl"]["two-phase"]["mean"] > f["rl"]["none"]["mean"],
        "RL: linear > none": lambda f: f["rl"]["linear"]["mean"] > f["rl"]["none"]["mean"],
        "against us: gauss within 0.05 of latent on pass@8": lambda f: abs(k(f, "gauss") - k(f, "latent")) < 0.05,
        "against us: RL with noise prefixes (two-phase) within 0.05 of latents": lambda f:
            f["rl_noise"]["two-phase"]["mean"] > f["rl"]["two-phase"]["mean"] - 0.05,
        "against us: RL with noise prefixes (two-phase) learns sooner: a higher mean over the run's evaluations": lambda f:
            f["rl_noise"]["two-phase"]["course"] > f["rl"]["two-phase"]["course"],
    }
    return {name: sum(map(test, figures.values())) for name, test in tests.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="base seeds (default: 0 1 2 3 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="RL seeds (default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=2, help="bases at a time (default: 2)")
    parser.add_argument("--out", default="runs/tiny-world", help="where everything goes (default: runs/tiny-world)")
    parser.add_argument("--write", action="store_true", help="put the figures into README.md and tests/tiny_world.json")
    parser.add_argument("--quick", action="store_true", help="one base, one seed, a minute's worth of training at most")
    args = parser.parse_args()
    if args.quick:
        args.bases, args.seeds, args.out = [0], [0], args.out + "-quick"
    began = time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(zip(args.bases, pool.map(lambda base: run_base(base, args), args.bases)))
    figures = {base: read(out) for base, out in folders.items()}
    note = (f"{len(args.bases)} bases x {len(args.seeds)} RL seeds; {os.cpu_count()} CPU cores, {args.jobs} processes of one thread, "
            f"{(time.time() - began) / 60:.0f} minutes; {date.today()}; mean ± standard deviation over RL seeds.")
    print(page(figures, note))
    if args.write:
        write(figures, note, Path(args.out))
    print(json.dumps({"claims": claims(figures), "bases": figures}))


if __name__ == "__main__":
    main()
