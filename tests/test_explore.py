"""tutorials/explore.py and explore.html: the page computes what PyTorch computes, and only that.

Its script runs in node, and the page itself in headless Chromium, which is driven through a pipe
(the DevTools protocol); what is not installed is skipped with the reason.
"""

import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

import explore
import tiny_world
from prefix import Sampling, generate_plainly, load_policy, prompt_of
from rewards import load_task_file, prompt_ids
from tiny_world import make_model, make_reader
from vae import VAE

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
CHECKS = 192  # of each of two stages


@pytest.fixture(scope="module")
def root(tmp_path_factory, vae):
    """A run folder of two stages with untrained weights, the second of them no end in sight."""
    root = tmp_path_factory.mktemp("tiny")
    reader = make_reader()
    for folder, seed in (("base", 1), ("grpo-two-phase-s0", 2)):
        model = make_model(seed=1)
        if seed != 1:  # near enough to the base that its VAE still fits
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(root / folder / "policy")
        reader.save(root / folder / "policy")
    vae.save(root / "vae")
    return root


@pytest.fixture(scope="module")
def data(root):
    return explore.page_data(explore.ExploreConfig(run=str(root), questions=1, checks=CHECKS))


@pytest.fixture(scope="module")
def page(data, root):
    """The file of the page."""
    path = root / "palette.html"
    path.write_text(explore.page_of(data))
    return path


# ---- node ----------------------------------------------------------------------------------------


def in_node(page, expression, **values):
    """What a JavaScript expression gives, with the page's functions and these values in scope."""
    program = """
        const fs = require("fs")
        const page = fs.readFileSync(process.argv[1], "utf8")
        const [, data] = page.match(/<script type="application.json" id="data">(.*?)<.script>/s)
        const [, script] = page.match(/<script>(.*?)<.script>/s)
        const given = JSON.parse(fs.readFileSync(0, "utf8"))
        const body = `${script}; load(data); return (${given.expression})`
        const run = new Function("data", ...Object.keys(given.values), body)
        console.log(JSON.stringify(run(JSON.parse(data), ...Object.values(given.values))))
    """
    given = json.dumps({"expression": expression, "values": values})
    command = [NODE, "-e", program, str(page)]
    result = subprocess.run(command, input=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


RUN_CHECKS = "(result => { for (const _ of checkJob(DATA.checks, result)); return result })({})"


@needs_node
def test_in_node_all_answers_are_pytorchs(page):
    result = in_node(page, RUN_CHECKS)
    assert result["count"] == result["equal"] == 2 * CHECKS
    assert result["worst"] < 1e-3


def test_the_checks_hold_every_source_and_length(data):
    kinds = {(check["source"], check["length"]) for check in data["checks"]}
    with_prefix = {(s, n) for s in ("prior", "math", "noise") for n in (1, 4, 8)}
    assert kinds == {("none", 0)} | with_prefix


def test_the_checks_are_what_the_plain_decoder_gives(data, root):
    """The answers in the page, by the Hugging Face module on rounded weights, without Decoder."""
    model, reader = load_policy(str(root / "base"))
    explore.round_weights(model)
    vae = VAE.load(root / "vae")
    explore.round_weights(vae)
    from prefix import embed_rows

    for check in data["checks"][:12]:
        prefix = None
        if "latent" in check:
            prefix = vae.decode(torch.tensor(check["latent"])).expand(check["length"], -1)
        elif "row" in check:
            prefix = torch.tensor(check["row"]).expand(check["length"], -1)
        prompt = prompt_of({"question": check["question"]}, reader)
        table = model.get_input_embeddings().weight.detach()
        rows = embed_rows(model, table, [prompt], [prefix])
        [completion] = generate_plainly(model, rows, explore.GREEDY, [0], [1])
        assert completion.ids == check["ids"]
