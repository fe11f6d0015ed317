"""Does the tiny vision-language model show Table 2's order on most seeds? Every base seed, all shown, with controls.

For each base seed it runs `python grpo.py --model tiny-vl --base-seed B` (pretraining on drawn scenes, VAE with the GPT decoder,
warm-up, arms, RL under three schedules); it uses bench_tiny_world.py's functions.

    python tests/bench_tiny_vl.py                  # 5 bases, two processes of one thread
    python tests/bench_tiny_vl.py --quick          # one base, hardly trained: checks the script, not the claims

Resumable: what is finished under --out is used as it is. Ends with one line of JSON. `--write` puts the figures into
tests/tiny_vl.json and, for the tutorial, the table and the pictures of the first base into tutorials/.
"""
import argparse
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import bench_tiny_world as world

ARMS = (*world.ARMS, "gauss + sampling")
START, END = "<!-- tests/bench_tiny_vl.py --write -->", "<!-- end -->"


def read(out):
    return world.read(out, rare=("box", "place"), domains=("box", "prose", "place"))


def claims(figures):
    """On how many bases each claim holds."""
    k = lambda f, arm: f["arms"][arm].get("pass@32", [0])[0]
    tests = {
        "pass@32: latent + sampling > latent > sampling > greedy (Table 2's order)": lambda f:
            k(f, "latent + sampling") > k(f, "latent") > k(f, "sampling") > k(f, "greedy"),
        "every domain steers >= 90%": lambda f: min(f["control"].values()) >= 0.9,
        "pass@32: latent > noise": lambda f: k(f, "latent") > k(f, "noise"),
        "against us: gauss within 0.05 of latent on pass@32, or above": lambda f: k(f, "gauss") > k(f, "latent") - 0.05,
        "against us: gauss + sampling within 0.05 of latent + sampling, or above": lambda f:
            k(f, "gauss + sampling") > k(f, "latent + sampling") - 0.05,
        "RL: two-phase > none": lambda f: f["rl"]["two-phase"]["mean"] > f["rl"]["none"]["mean"],
        "RL: linear > none": lambda f: f["rl"]["linear"]["mean"] > f["rl"]["none"]["mean"],
    }
    return {name: sum(map(test, figures.values())) for name, test in tests.items()}


def chance(scenes=2000):
    """How often the box of a random object of a scene is right."""
    from rewards import box_iou, tiny_scene
    rng, right = random.Random(0), 0
    for scene in (tiny_scene(rng) for _ in range(scenes)):
        right += box_iou(str(rng.choice([scene["bbox"], *scene["others"]])), str(scene["bbox"])) >= 0.5
    return right / scenes


def page(figures, note):
    """What stands in the tutorial: the table, the count of every claim, and how it was measured."""
    return world.page(figures, note, claims(figures), (*ARMS, "box"))


def write(figures, note, out):
    """tests/tiny_vl.json, the part of the tutorial between the markers, and the first base's pictures."""
    (world.ROOT / "tests" / "tiny_vl.json").write_text(json.dumps({"note": note, "figures": figures}, indent=1) + "\n")
    for name in ("boxes.png", "pass_at_k.png"):
        shutil.copy(out / f"base-{next(iter(figures))}" / "evaluation" / name, world.ROOT / "tutorials" / f"tiny_vl_{name}")
    tutorial = world.ROOT / "tutorials" / "09_grounding_with_a_palette.md"
    before, rest = tutorial.read_text().split(START)
    tutorial.write_text(before + START + "\n" + page(figures, note) + "\n" + END + rest.split(END)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="base seeds (default: 0 1 2 3 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="RL seeds (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="bases at a time (default: 2)")
    parser.add_argument("--out", default="runs/tiny-vl-bases", help="where everything goes (default: runs/tiny-vl-bases)")
    parser.add_argument("--write", action="store_true", help="put the figures into the tutorial and tests/tiny_vl.json")
    parser.add_argument("--quick", action="store_true", help="one base, hardly trained: under a minute")
    args = parser.parse_args()
    if args.quick:
        args.bases, args.seeds, args.out = [0], [0], args.out + "-quick"
    flags = ["--model", "tiny-vl", *(["--base-steps", "8"] if args.quick else []), "--arms", *ARMS, "box", "prose", "place"]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(zip(args.bases, pool.map(lambda base: world.run_base(base, args, flags, noise=False), args.bases)))
    figures = {str(base): read(out) for base, out in folders.items()}
    minutes = [json.loads((out / "logs" / "latents.json").read_text())["minutes"] for out in folders.values()]
    note = (f"The box of a random object would be right in {chance():.2f} of scenes. {len(args.bases)} bases x {len(args.seeds)} "
            f"RL seed, {min(minutes):.0f} to {max(minutes):.0f} minutes each on one thread of {os.cpu_count()} CPU cores; "
            f"{date.today()}.")
    print(page(figures, note))
    if args.write:
        write(figures, note, Path(args.out))
    print(json.dumps({"claims": claims(figures), "bases": figures}))


if __name__ == "__main__":
    main()
