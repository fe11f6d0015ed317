"""Does the tiny vision-language model show Table 2's order on most seeds? Each base seed, controls.

For each base seed it runs `python grpo.py --model tiny-vl --base-seed B` (pretraining on drawn
scenes, VAE with the GPT decoder, warm-up, RL under three schedules, arms), by the functions of
bench_tiny_world.py.

    python tests/bench_tiny_vl.py           # 5 bases, two processes of one thread
    python tests/bench_tiny_vl.py --quick   # one base, hardly trained: checks the script only

Resumable: what is finished under --out is used as it is. Ends with one line of JSON. `--write` puts
the figures into tests/tiny_vl.json and, for the tutorial, the table and the pictures of the first
base into tutorials/.
"""

import json
import os
import random
import shutil
from datetime import date

import bench_tiny_world as world

from drawn_scenes import STYLES, make_scene
from rewards import box_iou

START, END = "<!-- tests/bench_tiny_vl.py --write -->", "<!-- end -->"
ARMS = (*world.ARMS, "gauss + sampling")
RARE = ("box", "place")  # the styles whose leak counts


def read_figures(out):
    """One base's figures from its result files; of the arms, those that the page shows."""
    figures = world.read_figures(out, RARE, STYLES)
    arms = figures["arms"]
    figures["arms"] = {name: arms[name] for name in (*ARMS, *STYLES)}
    return figures


def claims_of_base(figures):
    """{claim: whether it holds} on one base."""
    pass32 = {arm: figures["arms"][arm]["pass@32"][0] for arm in ARMS}
    both = pass32["latent + sampling"]
    latent = pass32["latent"]
    none = figures["rl"]["none"]["mean"]

    claims = {}
    is_ordered = both > latent > pass32["sampling"] > pass32["greedy"]
    claims["pass@32: latent + sampling > latent > sampling > greedy (Table 2's order)"] = is_ordered
    claims["every domain steers >= 90%"] = min(figures["control"].values()) >= 0.9
    claims["pass@32: latent > noise"] = latent > pass32["noise"]
    is_near = pass32["gauss"] > latent - 0.05
    claims["against us: gauss within 0.05 of latent on pass@32, or above"] = is_near
    is_near = pass32["gauss + sampling"] > both - 0.05
    claims["against us: gauss + sampling within 0.05 of latent + sampling, or above"] = is_near
    claims["RL: two-phase > none"] = figures["rl"]["two-phase"]["mean"] > none
    claims["RL: linear > none"] = figures["rl"]["linear"]["mean"] > none
    return claims


def chance(scenes=2000):
    """How often the box of a random object of a scene is right."""
    rng = random.Random(0)
    right = 0
    for _ in range(scenes):
        scene = make_scene(rng)
        box = rng.choice(scene.boxes)
        right += box_iou(str(box), str(scene.boxes[0])) >= 0.5
    return right / scenes


def page(figures, note):
    """What stands in the tutorial: the table, the count of every claim, how it was measured."""
    counts = world.count_claims(figures, claims_of_base)
    return world.page(figures, note, counts, (*ARMS, "box"))


def write(figures, note, folder):
    """tests/tiny_vl.json, the part of the tutorial between the markers, and the pictures of the
    first base, which lie in `folder`."""
    world.write_json("tiny_vl.json", figures, note)
    tutorials = world.ROOT / "tutorials"
    for name in ("boxes.png", "pass_at_k.png"):
        shutil.copy(folder / "evaluation" / name, tutorials / f"tiny_vl_{name}")
    tutorial = tutorials / "09_grounding_with_a_palette.md"
    world.replace_between(tutorial, START, END, page(figures, note))


def minutes_of(folder):
    return json.loads((folder / "logs" / "latents.json").read_text())["minutes"]


def note_of(args, minutes):
    """How it was measured. minutes: of each base."""
    runs = f"{len(args.bases)} bases x {len(args.seeds)} RL seed"
    span = f"{min(minutes):.0f} to {max(minutes):.0f} minutes each"
    return (
        f"The box of a random object would be right in {chance():.2f} of scenes. {runs}, {span} "
        f"on one thread of {os.cpu_count()} CPU cores; {date.today()}."
    )


def main():
    args = world.parse_args(__doc__, seeds=[0], out="runs/tiny-vl-bases")
    flags = ["--model", "tiny-vl"]
    if args.quick:
        flags += ["--base-steps", "8"]
    folders = world.run_bases(args, flags, controls=False)

    figures = {}
    minutes = []
    for base, folder in folders.items():
        figures[str(base)] = read_figures(folder)
        minutes.append(minutes_of(folder))
    note = note_of(args, minutes)
    print(page(figures, note))
    if args.write:
        write(figures, note, folders[args.bases[0]])
    counts = world.count_claims(figures, claims_of_base)
    print(json.dumps({"claims": counts, "bases": figures}))


if __name__ == "__main__":
    main()
