"""The palette as a page: the tiny model, alive in one HTML file that asks no server.

A visitor moves a point through latent space and sees the answer change, beside the answers without
a prefix and under noise. The page holds the weights of the run's stages (base, after the warm-up,
after RL with and without latents) and computes every answer itself; explore.html is its template:
HTML, CSS and JavaScript. This file adds what a page cannot compute in a moment: the map's
background, which is the answers to many questions all over latent space.

Not in the paper. Weights are rounded to fp16, and what the page decodes is compared, when it opens,
with what PyTorch decodes from the same rounded weights.

Run it (about 15 seconds; `python grpo.py` does it at its end):
    python tutorials/explore.py                          # runs/tiny/palette.html
    python tutorials/explore.py --run runs/tiny-1 --out /tmp/palette.html
"""

import base64
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_world
from prefix import Decoder, Palette, Sampling, complete, load_policy, prompt_of
from rewards import Task, load_task_file
from vae import VAE, Reader, parse_settings, require_at_least, run_main, write_text

TEMPLATE = Path(__file__).with_name("explore.html")
LENGTH = 8  # L of the map and of the shares of right answers
GREEDY = Sampling(temperature=0.0, max_new_tokens=tiny_world.DEFAULTS["max_new_tokens"])

# ------------------------------------------------------------------------------------------------
# 1. The stages of a run, and their weights as text


@dataclass(frozen=True)
class Stage:
    """A point of the training. folders: patterns in the run folder; the first that fits a finished
    run is shown."""

    name: str  # in links to the page
    title: str
    folders: tuple


STAGES = (
    Stage("base", "base model", ("base",)),
    Stage("warm-up", "warm-up", ("sft",)),
    Stage("rl", "RL with latents", ("grpo-two-phase-s*", "*-two-phase-s*", "*-linear-s*")),
    Stage("rl-none", "RL without latents", ("grpo-none-s*", "*-none-s*")),
)


def seed_of(folder):
    """(the seed that a folder's name ends with, the name): s2 comes before s10."""
    digits = re.search(r"\d*$", folder.name)[0]
    return int(digits or 0), folder.name


def folder_of(stage, root):
    """The folder of a stage in the run folder; None where there is none that is finished."""
    for pattern in stage.folders:
        for folder in sorted(Path(root).glob(pattern), key=seed_of):
            if (folder / "policy" / "config.json").is_file():
                return folder
    return None


def round_weights(module):
    """Round all that a module saves to fp16, in place, so that page and PyTorch compute with the
    same numbers."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(tensor.half())


def packed(tensor):
    """A tensor as {shape, data}: base64 of its numbers in fp16. ValueError for one too large."""
    half = tensor.detach().half().contiguous()
    if not half.isfinite().all():
        raise ValueError("a weight does not fit into fp16: its page cannot be made")
    data = base64.b64encode(half.numpy().tobytes()).decode()
    return {"shape": list(half.shape), "data": data}


def shape_of(model):
    """What the page's forward pass must know. ValueError for a model that it does not compute."""
    config = model.config
    is_served = config.model_type == "qwen3" and config.tie_word_embeddings
    if not is_served or config.num_attention_heads != config.num_key_value_heads:
        raise ValueError("the page computes the Qwen3 of the tiny world alone, with a key per head")
    return {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "headDim": config.head_dim,
        "eps": config.rms_norm_eps,
        "theta": config.rope_parameters["rope_theta"],
    }


def packed_vae(vae):
    """The VAE's decoder, its moments of h, the domains' centres, and the plane of the map."""
    tensors = {"mean": packed(vae.mean), "gaussFactor": packed(vae.gauss_factor)}
    for name, tensor in vae.decoder.state_dict().items():
        tensors[f"decoder.{name}"] = packed(tensor)
    axes = plane_of(vae)
    return {
        "tensors": tensors,
        "scale": vae.scale.item(),
        "domains": vae.domains,
        "centres": (vae.domain_mean @ axes.T).tolist(),  # in the coordinates of the axes
        "axes": axes.tolist(),
    }


# ------------------------------------------------------------------------------------------------
# 2. The map


def plane_of(vae):
    """Orthonormal axes [k, k] of latent space; the first two span the plane that spreads the
    centres of the domains most, by singular values. In these axes the prior is N(0, I) as before.

    The last domain is turned to the bottom and the first to the left, so that the map of another
    seed looks alike.
    """
    if vae.rows_per_z != 1 or vae.latent < 2 or len(vae.domains) < 2:
        raise ValueError(
            "the map needs a VAE of two latents or more, two domains or more, and an MLP decoder"
        )
    centred = vae.domain_mean - vae.domain_mean.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=True)  # [k, k]

    x, y = (centred @ axes[:2].T)[-1].tolist()
    angle = -math.pi / 2 - math.atan2(y, x)
    cos = math.cos(angle)
    sin = math.sin(angle)
    turn = torch.tensor([[cos, -sin], [sin, cos]])
    plane = turn @ axes[:2]  # [2, k]
    if centred[0] @ plane[0] > 0:
        plane[0] = -plane[0]
    return torch.cat([plane, axes[2:]])


RADIUS, SPACING = 2.9, 0.4  # of the map: 1.5% of the prior's draws lie farther out
BLUR = 0.3  # a cell's shares are means over its neighbourhood


def map_cells():
    """Where the map is computed: points [C, 2] on a grid, not farther out than RADIUS."""
    steps = int(RADIUS / SPACING)
    line = torch.arange(-steps, steps + 1) * SPACING
    grid = torch.cartesian_prod(line, line)  # [C', 2]
    return grid[grid.norm(dim=1) <= RADIUS]


@dataclass
class Lab:
    """What answers questions at one stage, with weights rounded as the page has them."""

    model: torch.nn.Module
    reader: Reader
    task: Task
    vae: VAE
    table: torch.Tensor  # [V, d]
    decoder: Decoder

    @classmethod
    def of(cls, folder, task, vae):
        """The policy of a run folder. ValueError if the VAE is not one of its embeddings."""
        model, reader = load_policy(str(folder))
        round_weights(model)
        table = model.get_input_embeddings().weight.detach()
        vae.check_policy(table)
        return cls(model, reader, task, vae, table, Decoder(model, slots=256))

    def questions(self, family):
        """The test questions of a family."""
        return [row for row in self.task.test if row["family"] == family]

    def answer(self, rows, prefixes):
        """(completions, names of their styles, 1.0 or 0.0 for right and wrong), greedy."""
        prompts = [prompt_of(row, self.reader) for row in rows]
        seeds = range(len(rows))
        completions, texts = complete(self.decoder, self.reader, prompts, prefixes, GREEDY, seeds)
        styles = [self.task.style(text) for text in texts]
        right = []
        for row, completion, text in zip(rows, completions, texts):
            right.append(self.task.judge(text, row, completion.finish)["accuracy"])
        return completions, styles, right


STYLES = (*tiny_world.STYLES, "none")  # "none": without any word of a style


def answer_cells(lab, family, per_cell):
    """Shares [C, styles + 1] of each style, and of right answers, in every cell of the map.

    A cell is answered per_cell times: another question and another draw of the other dimensions
    each time, so that the map is right on average wherever they are.
    """
    points = map_cells().repeat_interleave(per_cell, 0)  # [N, 2], N = C * per_cell
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(len(points), lab.vae.latent - 2, generator=generator)
    z = torch.cat([points, rest], 1) @ plane_of(lab.vae)  # [N, k]
    prefixes = [row.expand(LENGTH, -1) for row in lab.vae.decode(z)]
    questions = lab.questions(family)
    rows = [questions[number % len(questions)] for number in range(len(points))]
    _, styles, right = lab.answer(rows, prefixes)

    values = torch.zeros(len(points), len(STYLES) + 1)
    for number, style in enumerate(styles):
        values[number, STYLES.index(style)] = 1
        values[number, -1] = right[number]
    return values.view(-1, per_cell, len(STYLES) + 1).mean(1)


def map_of(lab, family, per_cell):
    """The map's background for a family of questions: of each cell the commonest style, its share
    and the share of right answers; and the shares over all draws of the prior. In per cent."""
    cells = map_cells()
    shares = answer_cells(lab, family, per_cell)  # [C, styles + 1]
    squared_distances = torch.cdist(cells, cells).pow(2)  # [C, C]
    weights = torch.exp(-squared_distances / (2 * BLUR**2))
    blurred = weights @ shares / weights.sum(1, keepdim=True)  # [C, styles + 1]
    share, style = blurred[:, :-1].max(1)

    density = torch.exp(-cells.pow(2).sum(1) / 2)  # [C], of the prior, up to a factor
    over_prior = density @ shares / density.sum()  # [styles + 1]
    return {
        "style": style.tolist(),
        "share": per_cent(share),
        "right": per_cent(blurred[:, -1]),
        "stylesOverPrior": per_cent(over_prior[:-1]),
        "rightOverPrior": per_cent(over_prior[-1]),
    }


def per_cent(shares):
    """Shares as whole numbers of per cent."""
    return (shares * 100).round().int().tolist()


def controls_of(lab, family, count):
    """{control: per cent right} of `count` questions without prefix and under noise."""
    rows = lab.questions(family)[:count]
    shares = {}
    for source in ("none", "noise"):
        palette = Palette(None, lab.table, source, LENGTH)
        prefixes = [palette.draw(seed).embeddings for seed in range(len(rows))]
        _, _, right = lab.answer(rows, prefixes)
        shares[source] = per_cent(torch.tensor(right).mean())
    return shares


# ------------------------------------------------------------------------------------------------
# 3. Answers that the page must reproduce

CHECK_SOURCES = ("none", "prior", "math", "noise")
CHECK_LENGTHS = (1, 4, 8)


def checks_of(lab, count):
    """`count` greedy answers by PyTorch, of which the page decodes the same questions again: token
    ids and log-probs. A prefix is given as its latent, or as its row where it has none."""
    rows = lab.task.test[:count]
    prefixes = []
    checks = []
    for number, row in enumerate(rows):
        source = CHECK_SOURCES[number % len(CHECK_SOURCES)]
        length = CHECK_LENGTHS[number // len(CHECK_SOURCES) % len(CHECK_LENGTHS)]
        prefix = Palette(lab.vae, lab.table, source, length).draw(number)
        check = {"question": row["question"], "source": source, "length": length}
        if prefix.latent is not None:
            check["latent"] = prefix.latent[0].tolist()
        elif source == "noise":
            check["row"] = prefix.embeddings[0].tolist()
        else:
            check["length"] = 0
        prefixes.append(prefix.embeddings)
        checks.append(check)

    completions, _, _ = lab.answer(rows, prefixes)
    for check, completion in zip(checks, completions):
        check["ids"] = completion.ids
        check["logprobs"] = completion.logprobs
    return checks


# ------------------------------------------------------------------------------------------------
# 4. The page


def world_data():
    """What the page must know of the tiny world: all of it is tiny_world.py's."""
    return {
        "words": tiny_world.VOCABULARY,
        "end": tiny_world.END,
        "question": tiny_world.QUESTION,
        "answer": tiny_world.ANSWER,
        "styles": tiny_world.STYLES,
        "styleWords": tiny_world.STYLE_WORDS,
        "listOperations": tiny_world.LIST_OPERATIONS,
        "answerForm": tiny_world.ANSWER_FORM.pattern,
        "maxNewTokens": GREEDY.max_new_tokens,
    }


def stage_data(stage, folder, task, vae, config):
    """What the page holds of one stage."""
    lab = Lab.of(folder, task, vae)
    tensors = {}
    for name, tensor in lab.model.model.state_dict().items():
        tensors[name] = packed(tensor)
    maps = {}
    controls = {}
    for family in tiny_world.FAMILIES:
        maps[family] = map_of(lab, family, config.questions)
        controls[family] = controls_of(lab, family, 8 * config.questions)
    return {
        "name": stage.name,
        "title": stage.title,
        "folder": str(folder),
        "shape": shape_of(lab.model),
        "tensors": tensors,
        "maps": maps,
        "controls": controls,
        "checks": checks_of(lab, config.checks),
    }


def page_data(config):
    """All that the page holds, as JSON can write it. ValueError where the run lacks a base."""
    root = Path(config.run)
    if folder_of(STAGES[0], root) is None:
        raise ValueError(f"no finished base in {root}/base: run python grpo.py first")
    vae = VAE.load(root / "vae")
    round_weights(vae)
    packed_latents = packed_vae(vae)  # first: it refuses a VAE that has no map
    task = load_task_file(tiny_world.__file__, splits=("test",))

    stages = []
    for stage in STAGES:
        folder = folder_of(stage, root)
        if folder is not None:
            stages.append(stage_data(stage, folder, task, vae, config))
    return {
        "world": world_data(),
        "vae": packed_latents,
        "stages": stages,
        "cells": map_cells().tolist(),
        "length": LENGTH,
        "start": task.test[0]["question"],
    }


def marks_of(data):
    """The background of the map as it is before any script runs: SVG, a mark a cell."""
    stages = {stage["name"]: stage for stage in data["stages"]}
    stage = stages.get("warm-up", data["stages"][0])
    shown = stage["maps"][tiny_world.FAMILIES[0]]
    marks = []
    for (x, y), style, right in zip(data["cells"], shown["style"], shown["right"]):
        name = STYLES[style]
        size = 4 + 13 * math.sqrt(right / 100)
        faint = max(0.12, math.exp(-(x * x + y * y) / 4))
        place = f"translate({100 * x:.0f} {-100 * y:.0f}) scale({size:.1f})"
        marks.append(
            f'<use href="#mark-{name}" class="{name}" opacity="{faint:.2f}" transform="{place}"/>'
        )
    return "\n".join(marks)


def page_of(data):
    """The template with the data in it: a whole page."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("__MARKS__", marks_of(data)).replace("__DATA__", text)


def make_page(config):
    """Write the page of a run. Returns its path."""
    out = Path(config.out or f"{config.run}/palette.html")
    write_text(out, page_of(page_data(config)))
    return out


# ------------------------------------------------------------------------------------------------
# 5. Command line


@dataclass
class ExploreConfig:
    """Settings of the page."""

    run: str = HfArg(default="runs/tiny", help="the folder that grpo.py has filled")
    out: str | None = HfArg(default=None, help="(default: palette.html in that folder)")
    questions: int = HfArg(default=4, help="of each family, for every cell of the map")
    checks: int = HfArg(default=4, help="answers of each stage that the page compares with PyTorch")

    def __post_init__(self):
        require_at_least(self, questions=1, checks=0)


def main(argv=None):
    """Make the page and say where it is."""
    path = make_page(parse_settings(ExploreConfig, __doc__, argv))
    print(f"the palette, to open in a browser: {path}")


if __name__ == "__main__":
    run_main(main, "explore.py")
